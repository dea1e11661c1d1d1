import csv

import pytest
import torch
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import steps
from featinv import FeatInv
from featinv.metrics import spatial_cosine
from featinv.utils.pixels import eight_bit, from_uint8

DATA = ["data=photos", "data.crops_per_photo=1"]


def test_cosine_against_steps(tmp_path, capsys):
    checkpoint = f"checkpoint={tiny_run()}"
    overrides = [checkpoint, *DATA, "schedulers=[ddim,unipc]", "steps=[1,3]", "num_samples=2"]
    run("steps", *overrides, f"output={tmp_path}", task=steps.main)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["scheduler"], row["steps"]) for row in rows] == [
        ("ddim", "3"),
        ("ddim", "1"),
        ("unipc", "3"),
        ("unipc", "1"),
    ]
    assert rows[0]["difference to the first row"] == "0.000 [0.000, 0.000]"
    page = (tmp_path / "table.md").read_text()
    assert "3 images, 2 samples each, seed 0" in page and "experiments/steps.py checkpoint=" in page
    assert rows[3]["spatial cosine"] in page and page.split("\n\n")[1] in capsys.readouterr().out
    with Image.open(tmp_path / "cosine_against_steps.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 10


@torch.no_grad()
def test_a_row_is_the_mean_cosine_of_the_reconstructions(images):
    model = FeatInv.load(tiny_run())
    batch = {"image": ((images + 1) * 127.5).round().byte(), "index": torch.tensor([4, 0, 7])}
    config = type("Config", (), {"num_samples": 2, "seed": 3, "batch_size": 2})
    cosine, seconds = steps.measure(model, [batch], config)
    features = model.backbone.features(from_uint8(batch["image"]))
    drawn = eight_bit(model.invert(features, 2, seed=3, indices=[4, 0, 7]))
    for i in range(3):
        both = [
            spatial_cosine(features[i : i + 1], model.backbone.features(drawn[i, s][None]))
            for s in range(2)
        ]
        assert cosine[i].item() == pytest.approx(torch.stack(both).mean().item(), abs=1e-4)
    assert seconds > 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedulers=[dimm]", "Unknown scheduler 'dimm': did you mean ddim?"),
        ("steps=[0]", "steps is 0: expected an integer of at least 1"),
        ("checkpoint=nothing", "There is no checkpoint 'nothing'"),
    ],
)
def test_bad_values_are_told_first(tmp_path, capsys, override, sentence):
    overrides = [f"checkpoint={tiny_run()}", *DATA, f"output={tmp_path}", override]
    assert mistake(capsys, "steps", *overrides, task=steps.main).startswith(sentence)
