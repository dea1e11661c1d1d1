import csv
import json

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import units
from experiments.units import at_channels, at_position, at_unit, locality
from featinv import FeatInv
from featinv.data import PhotosDataModule
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3"]


def measured(folder, *overrides: str) -> dict[str, dict[str, list[float]]]:
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={folder}", *overrides]
    run("units", *overrides, task=units.main)
    return json.loads((folder / "results.json").read_text())


def flat_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.flatten(), b.flatten()
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
def test_every_number_is_that_of_a_naive_loop(tmp_path):
    guided = "sampler.feature_guidance_scale=1"  # or two steps of training would not show
    found = measured(tmp_path, "num_samples=2", "channels=0.02", "value=0.5", guided)
    assert list(found) == ["centre", "corner", "10 channels", "unit"]
    model = FeatInv.load(tiny_run())
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    backbone = model.backbone
    for i, image in enumerate(batch["image"]):
        features, logits = backbone.features_and_logits(from_uint8(image)[None])
        edited = features.clone()
        edited[0, :, 1, 1] = 0.5  # the map is 2 x 2
        before, after = (
            eight_bit(model.invert(f, 2, seed=0, indices=[i], feature_guidance_scale=1)[0])
            for f in (features, edited)
        )
        values = {name: 0.0 for name in found["centre"]}
        for a, b in zip(before, after, strict=True):
            (seen_a, logits_a), (seen_b, logits_b) = (
                backbone.features_and_logits(x[None]) for x in (a, b)
            )
            change = (a - b).abs() / 2
            rest = change.clone()
            rest[:, 16:, 16:] = 0  # the lower right quarter of 32 x 32 pixels
            quarter = float(change[:, 16:, 16:].mean())
            step, wanted = (seen_b - seen_a).flatten(), (edited - features).flatten()
            label = int(logits.argmax())
            probabilities = [x.softmax(1)[0, label] for x in (logits_a, logits_b)]
            values["change"] += float(change.mean()) / 2
            values["inside"] += quarter / float(rest.sum() / (3 * 3 * 16 * 16)) / 2
            values["obtained"] += float(step @ wanted / (wanted @ wanted)) / 2
            values["edited"] += flat_cosine(edited, seen_b) / 2
            values["original"] += flat_cosine(features, seen_b) / 2
            values["probability"] += float(probabilities[1] - probabilities[0]) / 2
        assert values["change"] > 1e-3
        for name, value in values.items():
            assert found["centre"][name][i] == pytest.approx(value, rel=2e-2, abs=1e-3), name
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["inside the position / outside"] != "" for row in rows] == [1, 1, 0, 1]
    assert "inside" not in found["10 channels"]
    page = (tmp_path / "table.md").read_text()
    assert "set to 0.5; 3 images, 2 sample(s) each, seed 0" in page
    with Image.open(tmp_path / "units.png") as picture:
        assert picture.width > picture.height


def test_edits_of_each_image():
    features = torch.zeros(2, 4, 2, 3)
    features[0, 2], features[0, 1, 1, 2] = 2.0, -5.0
    features[1, 3], features[1, 0, 0, 1] = -1.0, 4.0
    edited, where = at_unit(features, 0.0)
    assert where.nonzero().tolist() == [[0, 1, 2], [1, 0, 1]]
    assert edited[0, 1, 1, 2] == edited[1, 0, 0, 1] == 0
    assert int((edited != features).sum()) == 2
    edited = at_channels(features, 1, 7.0)
    assert (edited[0, 2] == 7).all() and (edited[1, 3] == 7).all()
    assert int((edited != features).sum()) == 2 * 6
    edited, where = at_position(features, (1, 0), 3.0)
    assert (edited[:, :, 1, 0] == 3).all() and int((edited != features).sum()) == 2 * 4
    assert where.nonzero().tolist() == [[0, 1, 0], [1, 1, 0]]


def test_locality_is_the_ratio_of_two_means():
    change = torch.ones(2, 9, 9)
    change[0, 3:6, 6:] = 5.0
    where = torch.zeros(2, 3, 3, dtype=torch.bool)
    where[:, 1, 2] = True
    assert locality(change, where).tolist() == pytest.approx([5, 1])


def test_positions_of_ones_own(tmp_path):
    found = measured(tmp_path, "positions=[[0,1]]", "channels=null", "unit=false")
    assert list(found) == ["position 0, 1"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["positions=[[2,0]]"], "There is no row 2: expected 0 to 1"),
        (["positions=[3]"], "positions is [3]: expected [[row, column], ...]"),
        (["channels=1.5"], "channels is 1.5, expected a share above 0 and up to 1"),
        (["positions=[]", "channels=null", "unit=false"], "There is nothing to edit"),
        (["num_samples=0"], "num_samples is 0: expected an integer of at least 1"),
        (["checkpoint=nothing"], "There is no checkpoint 'nothing'"),
    ],
)
def test_bad_input(overrides, sentence, tmp_path, capsys):
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", *overrides]
    assert sentence in mistake(capsys, "units", *overrides, task=units.main)
