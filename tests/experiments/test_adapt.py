import json

import pytest
import torch

from featinv.analysis.adapt import AdaptedBackbone
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit

PHOTOS = ["data=photos", "data.crops_per_photo=1", "num_images=3"]
NEW = ["backbone=resnet10t_random", "+backbone.num_classes=10"]


@torch.no_grad()
def test_the_very_encoder_of_the_model_is_inverted_as_ever(
    tiny, model, photographs, experiment, tmp_path
):
    few = ["num_fit_images=[4,256]", f"trained={tiny('spatial')}", "num_pictures=2"]
    checkpoint = f"checkpoint={tiny('spatial')}"
    rows = experiment("adapt", checkpoint, *NEW, *PHOTOS, *few, output=tmp_path)
    names = ["4 images", "256 images", "a model trained for it", "floor: another image"]
    assert [row["fitted to"] for row in rows] == names
    found = json.loads((tmp_path / "results.json").read_text())
    features = model.backbone.features(photographs)
    drawn = eight_bit(model.invert(features)[:, 0])
    expected = spatial_cosine(features, model.backbone.features(drawn))
    trained = torch.tensor(found["a model trained for it"]["cosine"])
    torch.testing.assert_close(trained, expected, atol=1e-3, rtol=0)
    few, many = (torch.tensor(found[name]["predicted"]) for name in names[:2])
    assert (many > few).all() and many.min() > 0.9  # nearly the identity
    adapted = AdaptedBackbone.load(tmp_path / "map_256.safetensors", model.backbone)
    again = spatial_cosine(adapted.features(photographs), features)
    torch.testing.assert_close(again, many, atol=1e-3, rtol=0)
    floor = torch.tensor(found["floor: another image"]["cosine"])
    pairs = [spatial_cosine(features[i : i + 1], features) for i in range(3)]
    for i in range(3):  # some other photograph
        assert min(abs(pairs[i][j] - floor[i]) for j in range(3) if j != i) < 1e-4
        over = found["256 images"]["cosine"][i] - floor[i]
        assert found["256 images"]["over_floor"][i] == pytest.approx(float(over), abs=1e-5)
    assert float(rows[0]["seconds"]) >= 0 and "seconds" in rows[1]
    assert (tmp_path / "pictures.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["num_fit_images=[1]"], "num_fit_images is 1: expected an integer of at least 2"),
        (["num_fit_images=[2]", "backbone.name=resnet18"], "that was trained for"),
    ],
)
def test_bad_input(overrides, sentence, tiny, refusal):
    checkpoint = str(tiny("spatial"))
    given = [f"checkpoint={checkpoint}", f"trained={checkpoint}", *NEW, *PHOTOS, *overrides]
    assert sentence in refusal("adapt", *given)
