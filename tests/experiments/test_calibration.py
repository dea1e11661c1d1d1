import json
import re

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import calibration
from featinv.analysis.calibration import Calibration
from featinv.utils.pixels import eight_bit, resize

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "num_samples=3"]


@torch.no_grad()
def test_every_setting_is_measured_in_every_space(tiny, model, photographs, experiment, tmp_path):
    methods = ", ".join(
        f"{name}: {{checkpoint: '{tiny('spatial')}', sampler: {{guidance_scale: {scale}}}}}"
        for name, scale in {"weak": 1, "strong": 5}.items()
    )
    own = ["~checkpoint", "witness=lite2", "~methods", f"+methods={{{methods}}}"]
    rows = experiment("calibration", *own, *DATA, output=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["weak", "strong"]
    assert list(results["weak"]) == ["cosine", "pixels", "low pass", "latents", "witness"]
    samples = eight_bit(model.invert(model.backbone.features(photographs), 3, guidance_scale=5))
    expected, originals = Calibration(3), eight_bit(resize(photographs, 32))
    expected.update(samples, originals, originals.roll(-1, 0))
    found = results["strong"]["pixels"]
    for name in ("between", "to_original", "ranks", "reference_ranks"):
        assert found[name] == pytest.approx(expected[name].tolist(), rel=1e-2), name
    assert [row["setting"] for row in rows] == ["weak", "strong"]
    ratio = float(rows[1]["ratio, pixels"].split()[0])
    assert ratio == pytest.approx(expected.ratio()[0], abs=1e-2)
    assert (tmp_path / "calibration.png").is_file()
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
