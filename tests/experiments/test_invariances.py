import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import invariances
from featinv import FeatInv
from featinv.data import PhotosDataModule
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3"]


def naive_spread(samples: list[torch.Tensor]) -> float:
    mean = sum(samples) / len(samples)
    squares = [float((sample - mean).square().sum()) for sample in samples]
    return (sum(squares) / (len(samples) - 1)) ** 0.5


@torch.no_grad()
def test_spreads_are_those_of_a_naive_loop(tmp_path):
    other = tiny_run("conditioning=pooled")
    checkpoints = f"checkpoints=[{tiny_run()}/model.safetensors]"
    overrides = [checkpoints, *DATA, "num_samples=4", f"output={tmp_path}"]
    run("invariances", *overrides, task=invariances.main)
    found = json.loads((tmp_path / "results.json").read_text())["model"]
    model = FeatInv.load(tiny_run())
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    samples = eight_bit(model.invert(model.backbone.features(from_uint8(batch["image"])), 4))
    features = [[model.backbone.features(x[None])[0] for x in image] for image in samples]
    between = naive_spread([samples[i, 0] for i in range(3)])
    between_features = naive_spread([features[i][0] for i in range(3)])
    for i in range(3):
        pixels = naive_spread(list(samples[i])) / between
        inner = naive_spread(features[i]) / between_features
        assert found["pixels"][i] == pytest.approx(pixels, rel=1e-2)
        assert found["features"][i] == pytest.approx(inner, rel=1e-2)
        assert found["ratio"][i] == pytest.approx(pixels / inner, rel=1e-2)
    assert len(found["channels"]) == 512 and other.exists()
    assert "3 images, 4 samples each, seed 0" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "invariances.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 100


def test_models_stand_side_by_side(tmp_path):
    names = ["spatial", "pooled"]
    for name in names:
        (tmp_path / name).symlink_to(tiny_run(f"conditioning={name}"))
    checkpoints = ",".join(f"{tmp_path / name}/" for name in names)
    overrides = [f"checkpoints=[{checkpoints}]", *DATA, "num_samples=2"]
    run("invariances", *overrides, f"output={tmp_path / 'out'}", task=invariances.main)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == names


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("num_samples=1", "num_samples is 1: expected an integer of at least 2"),
        ("num_images=1", "A spread between images takes two, got one"),
        ("checkpoints=[nowhere]", "There is no model in 'nowhere'"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    overrides = [f"checkpoints=[{tiny_run()}]", *DATA, f"output={tmp_path}", override]
    assert sentence in mistake(capsys, "invariances", *overrides, task=invariances.main)
