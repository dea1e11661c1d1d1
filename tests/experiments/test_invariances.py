import json

import pytest
import torch

from featinv.utils.pixels import eight_bit

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]


def naive_spread(samples: list[torch.Tensor]) -> float:
    mean = sum(samples) / len(samples)
    squares = [float((sample - mean).square().sum()) for sample in samples]
    return (sum(squares) / (len(samples) - 1)) ** 0.5


@torch.no_grad()
def test_spreads_are_those_of_a_naive_loop(tiny, model, photographs, experiment, tmp_path):
    models = f"checkpoints=[{tiny('spatial')},{tiny('middle')}]"
    few = ["num_samples=4", "num_pictures=2"]
    rows = experiment("invariances", models, *PHOTOS, *few, output=tmp_path)
    assert [row["model"] for row in rows] == ["spatial", "middle"]
    found = json.loads((tmp_path / "results.json").read_text())["spatial"]
    samples = eight_bit(model.invert(model.backbone.features(photographs), 4))
    features = [[model.backbone.features(x[None])[0] for x in image] for image in samples]
    between = naive_spread([samples[i, 0] for i in range(3)])
    between_features = naive_spread([features[i][0] for i in range(3)])
    for i in range(3):
        pixels = naive_spread(list(samples[i])) / between
        inner = naive_spread(features[i]) / between_features
        assert found["pixels"][i] == pytest.approx(pixels, rel=1e-2)
        assert found["features"][i] == pytest.approx(inner, rel=1e-2)
        assert found["ratio"][i] == pytest.approx(pixels / inner, rel=1e-2)
    assert len(found["channels"]) == 512
    assert "3 images, 4 sample(s) each, seed 0" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "invariances.png").is_file()


def test_one_sample_has_no_spread(tiny, refusal):
    said = refusal("invariances", f"checkpoints=[{tiny('spatial')}]", "num_images=1")
    assert "num_images is 1: expected an integer of at least 2" in said
    said = refusal("invariances", f"checkpoints=[{tiny('spatial')}]", "num_samples=1")
    assert "num_samples is 1: expected an integer of at least 2" in said
