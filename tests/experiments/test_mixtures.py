import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import mixtures
from featinv import FeatInv
from featinv.analysis.edits import mix
from featinv.data import PhotosDataModule
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3"]


@torch.no_grad()
def test_mixtures_are_inverted_in_features_and_in_pixels(tmp_path):
    few = ["weights=[0,0.5]", "halves=[left]", "channels=0.25", "num_pictures=2"]
    overrides = [f"checkpoint={tiny_run()}", *DATA, *few, f"output={tmp_path}"]
    run("mixtures", *overrides, task=mixtures.main)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [
        "linear 0",
        "linear 0.5",
        "spherical 0",
        "spherical 0.5",
        "left half",
        "128 channels",
    ]
    assert list(results["128 channels"]) == ["features"]
    model = FeatInv.load(tiny_run())
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    images = from_uint8(batch["image"])
    features, logits = model.backbone.features_and_logits(images)
    target = mix(features, features.roll(-1, 0), 0.5)
    in_pixels = model.backbone.features((images + images.roll(-1, 0)) / 2)
    classes = logits.argmax(1)
    for way, asked in (("features", target), ("pixels", in_pixels)):
        seen, seen_logits = model.backbone.features_and_logits(eight_bit(model.invert(asked)[:, 0]))
        found = results["linear 0.5"][way]
        cosine = spatial_cosine(target, seen).tolist()
        assert found["cosine"] == pytest.approx(cosine, abs=2e-3)
        second = seen_logits.softmax(1)[range(3), classes.roll(-1, 0)].tolist()
        assert found["second"] == pytest.approx(second, rel=1e-2)
    same = results["linear 0"]  # the first image itself, both ways
    assert same["features"]["cosine"] == pytest.approx(same["pixels"]["cosine"], abs=2e-3)
    assert "3 pairs, 1 sample(s) each, seed 0" in (tmp_path / "table.md").read_text()
    for name in ("linear", "spherical", "splices"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 100


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("paths=[linar]", "Unknown path of a mixture 'linar': did you mean linear"),
        ("halves=[lft]", "Unknown side 'lft': did you mean left"),
        ("channels=1.5", "channels is 1.5, expected a share above 0 and below 1"),
        ("num_images=1", "A mixture takes two images, got one"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", override]
    assert sentence in mistake(capsys, "mixtures", *overrides, task=mixtures.main)
