import csv
import json
import re

import pytest
import torch
from helpers import mistake, tiny_run
from hydra.utils import instantiate
from omegaconf import OmegaConf

import calibration
from featinv import FeatInv
from featinv.analysis.calibration import Calibration
from featinv.data import PhotosDataModule
from featinv.utils.pixels import eight_bit, from_uint8, resize

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "num_samples=3"]


def arguments(tmp_path) -> list[str]:
    """Return two settings of a tiny model."""
    methods = ", ".join(
        f"{name}: {{checkpoint: '{tiny_run()}', sampler: {{guidance_scale: {scale}}}}}"
        for name, scale in {"weak": 1, "strong": 5}.items()
    )
    return ["~methods", f"+methods={{{methods}}}", *DATA, f"output={tmp_path}"]


@torch.no_grad()
def test_every_setting_is_measured_in_every_space(experiment, tmp_path):
    own = ["~checkpoint", "witness=lite2"]
    experiment("calibration", *own, *arguments(tmp_path), output=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["weak", "strong"]
    assert list(results["weak"]) == ["cosine", "pixels", "low pass", "latents", "witness"]
    model = FeatInv.load(tiny_run())
    (batch,) = PhotosDataModule(image_size=64, batch_size=3, crops_per_photo=1).test_dataloader()
    images = from_uint8(batch["image"])
    features = model.backbone.features(images)
    samples = eight_bit(model.invert(features, 3, guidance_scale=5))
    expected, originals = Calibration(3), eight_bit(resize(images, 32))
    expected.update(samples, originals, originals.roll(-1, 0))
    found = results["strong"]["pixels"]
    for name in ("between", "to_original", "ranks", "reference_ranks"):
        assert found[name] == pytest.approx(expected[name].tolist(), rel=1e-2), name
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["weak", "strong"]
    assert float(rows[1]["ratio, pixels"].split()[0]) == pytest.approx(
        expected.ratio()[0], abs=1e-2
    )
    assert (tmp_path / "calibration.png").stat().st_size > 10000
    off = {row["setting"]: float(row["off by a factor of"]) for row in rows}
    (best,) = re.findall(r"Nearest to 1: (\w+)\.", (tmp_path / "table.md").read_text())
    assert off[best] == min(off.values())
    sampler = instantiate(OmegaConf.load(tmp_path / "calibrated.yaml"))
    assert sampler == model.settings(guidance_scale={"weak": 1, "strong": 5}[best])


def test_how_far_ratios_are_off():
    def samples(between: float) -> Calibration:
        numbers = {"between": torch.full((4,), between), "to_original": torch.ones(4)}
        return Calibration.of(3, numbers)

    spaces = {"a": samples(0.5), "b": samples(2.0), "c": samples(1.0)}
    assert calibration.off(spaces) == pytest.approx(2 ** (2 / 3))
    assert calibration.off(spaces | {"d": samples(0.0)}) == float("inf")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("num_samples=1", "num_samples is 1: expected an integer of at least 2"),
        ("num_images=1", "There is no other image to compare with: expected two or more."),
        ("checkpoints=[nowhere]", "There is no model in 'nowhere'"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    overrides = [*arguments(tmp_path), "witness=null", override]
    assert sentence in mistake(capsys, "calibration", *overrides, task=calibration.main)
