import json

import pytest
import torch
from omegaconf import OmegaConf

from featinv import InputError
from featinv.analysis.edits import mix
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit
from mixtures import mixers

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


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"paths": ["linar"]}, "Unknown path of a mixture 'linar': did you mean linear"),
        ({"channels": 1.5}, "channels is 1.5, expected a share above 0 and below 1"),
    ],
)
def test_bad_mixtures(values, sentence):
    config = {"paths": ["linear"], "weights": [0.5], "halves": ["left"], "channels": 0.5, "seed": 0}
    with pytest.raises(InputError, match=sentence):
        mixers(OmegaConf.create(config | values), 4)
