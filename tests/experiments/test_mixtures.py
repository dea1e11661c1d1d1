import json

import pytest
import torch
from omegaconf import OmegaConf

from featinv import InputError
from featinv.analysis.edits import mix
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8
from mixtures import grid, mixers

PHOTOS = ["data.crops_per_photo=1", "num_images=3"]


@torch.no_grad()
def test_mixtures_are_inverted_in_features_and_in_pixels(
    tiny, model, photographs, experiment, tmp_path
):
    few = ["weights=[0,0.5]", "halves=[left]", "channels=0.25", "num_pictures=2"]
    rows = experiment("mixtures", f"checkpoint={tiny('spatial')}", *PHOTOS, *few, output=tmp_path)
    names = ["linear 0", "linear 0.5", "spherical 0", "spherical 0.5", "left half", "128 channels"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == names and list(results["128 channels"]) == ["features"]
    assert [row["mixed in"] for row in rows[:2]] == ["features", "pixels"]
    features, logits = model.backbone.features_and_logits(photographs)
    target = mix(features, features.roll(-1, 0), 0.5)
    in_pixels = model.backbone.features(eight_bit((photographs + photographs.roll(-1, 0)) / 2))
    second = logits.argmax(1).roll(-1, 0)
    for way, condition in (("features", target), ("pixels", in_pixels)):
        drawn = eight_bit(model.invert(condition)[:, 0])
        seen, seen_logits = model.backbone.features_and_logits(drawn)
        found = results["linear 0.5"][way]
        cosine = spatial_cosine(target, seen).tolist()
        assert found["cosine"] == pytest.approx(cosine, abs=2e-3)
        probability = seen_logits.softmax(1)[range(3), second].tolist()
        assert found["second"] == pytest.approx(probability, rel=1e-2)
    same = results["linear 0"]  # the first image itself, both ways
    assert same["features"]["cosine"] == pytest.approx(same["pixels"]["cosine"], abs=2e-3)
    assert "3 pairs, 1 sample(s) each, seed 0" in (tmp_path / "table.md").read_text()
    for name in ("linear", "spherical", "splices"):
        assert (tmp_path / f"{name}.png").is_file()


@torch.no_grad()
def test_noise_is_that_of_the_images_own_numbers(model, photographs):
    values = {"paths": ["linear"], "weights": [0], "halves": [], "channels": None, "sampler": {}}
    values |= {"seed": 0, "batch_size": 4, "num_samples": 1, "precision": "32-true"}
    images = {"image": to_uint8(photographs), "index": torch.arange(7, 10), "key": list("abc")}
    found = grid(model, images, [1, 2, 0], OmegaConf.create(values))["linear 0, features"]()
    features = model.backbone.features(from_uint8(images["image"]))
    expected = to_uint8(model.invert(features, indices=[7, 8, 9])[:, 0])
    assert (found["drawn"].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"paths": ["linar"]}, "Unknown path of a mixture 'linar': did you mean linear"),
        ({"channels": 1.5}, "channels is 1.5, expected a share above 0 and up to 1"),
    ],
)
def test_bad_mixtures(values, sentence):
    config = {"paths": ["linear"], "weights": [0.5], "halves": ["left"], "channels": 0.5, "seed": 0}
    with pytest.raises(InputError, match=sentence):
        mixers(OmegaConf.create(config | values), 4)
