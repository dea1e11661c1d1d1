import json

import pytest
import torch

from featinv.analysis.adapt import AdaptedBackbone
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit

PHOTOS = ["data=photos", "data.crops_per_photo=1", "num_images=3"]
NEW = ["backbone=resnet10t_random", "+backbone.num_classes=10"]


@torch.no_grad()
def test_the_models_own_encoder_is_inverted_as_without_a_map(
    tiny, model, photographs, experiment, tmp_path
):
    own = ["num_fit_images=[4,160]", f"trained={tiny('spatial')}", "num_pictures=2"]
    checkpoint = f"checkpoint={tiny('spatial')}"
    rows = experiment("adapt", checkpoint, *NEW, *PHOTOS, *own, output=tmp_path)
    names = ["4 images", "160 images", "a model trained for it", "floor: another image"]
    assert [row["fitted to"] for row in rows] == names
    found = json.loads((tmp_path / "results.json").read_text())
    features = model.backbone.features(photographs)
    drawn = eight_bit(model.invert(features)[:, 0])
    expected = spatial_cosine(features, model.backbone.features(drawn))
    trained = torch.tensor(found["a model trained for it"]["cosine"])
    torch.testing.assert_close(trained, expected, atol=1e-3, rtol=0)
    few, many = (torch.tensor(found[name]["predicted"]) for name in names[:2])
    assert (many > few).all() and many.min() > 0.9  # nearly the identity
    adapted = AdaptedBackbone.load(tmp_path / "map_160.safetensors", model.backbone)
    again = spatial_cosine(adapted.features(photographs), features)
    torch.testing.assert_close(again, many, atol=1e-3, rtol=0)
    floor = torch.tensor(found["floor: another image"]["cosine"])
    torch.testing.assert_close(
        floor, spatial_cosine(features, features.roll(-1, 0)), atol=1e-4, rtol=0
    )
    over = torch.tensor(found["160 images"]["cosine"]) - floor
    assert found["160 images"]["over_floor"] == pytest.approx(over.tolist(), abs=1e-5)
    assert (tmp_path / "pictures.png").is_file()


def test_a_model_of_another_encoder_is_no_comparison(tiny, refusal):
    given = [f"checkpoint={tiny('spatial')}", f"trained={tiny('spatial')}", *NEW, *PHOTOS]
    assert "that was trained for" in refusal(
        "adapt", *given, "num_fit_images=[2]", "backbone.name=resnet18"
    )
