import json
import re

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import calibration
from featinv.analysis.calibration import calibrate, ratio_interval
from featinv.backbones import Backbone
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
    originals = eight_bit(resize(photographs, 32))
    expected = calibrate(samples, originals, originals.roll(-1, 0), range(3))
    found = results["strong"]["pixels"]
    for name in ("between", "to_original", "ranks", "reference_ranks"):
        assert found[name] == pytest.approx(expected[name].tolist(), rel=1e-2), name
    assert [row["setting"] for row in rows] == ["weak", "strong"]
    ratio = float(rows[1]["ratio, pixels"].split()[0])
    pairs = expected["between"], expected["to_original"]
    assert ratio == pytest.approx(ratio_interval(*pairs)[0], abs=1e-2)
    assert (tmp_path / "calibration.png").is_file()
    off = {row["setting"]: float(row["off by a factor of"]) for row in rows}
    (best,) = re.findall(r"Nearest to 1: (\w+)\.", (tmp_path / "table.md").read_text())
    assert off[best] == min(off.values())
    sampler = instantiate(OmegaConf.load(tmp_path / "calibrated.yaml"))
    assert sampler == model.settings(guidance_scale={"weak": 1, "strong": 5}[best])


def numbers(between: float) -> dict[str, torch.Tensor]:
    names = {"between": torch.full((4,), between), "to_original": torch.ones(4)}
    return names | {"photograph": torch.arange(4)}


def test_how_far_ratios_are_off():
    spaces = {"a": numbers(0.5), "b": numbers(2.0), "c": numbers(1.0)}
    assert calibration.off(spaces, "abc") == pytest.approx(2 ** (2 / 3))
    assert calibration.off(spaces | {"d": numbers(0.0)}, "abcd") == float("inf")


def test_a_model_without_latents_is_compared_in_the_other_spaces():
    ranks = {name: torch.zeros(4, dtype=torch.int64) for name in ("ranks", "reference_ranks")}
    pixels, latents = (numbers(ratio) | ranks for ratio in (0.5, 4.0))
    measured = {"featinv": {"pixels": pixels, "latents": latents}, "decoder": {"pixels": pixels}}
    rows = [calibration.table_row(own, ["pixels"], 3) for own in measured.values()]
    assert [row["off by a factor of"] for row in rows] == ["2.000", "2.000"]
    assert "ratio, latents" in rows[0] and "ratio, latents" not in rows[1]
    panels = calibration.calibration_figure(measured, 3).axes
    assert [len(panels[i].containers) for i in (0, 3)] == [2, 1]  # pixels, latents


def test_intervals_are_over_photographs():
    crops = {
        "between": torch.tensor([1.0, 3.0]).repeat_interleave(10),
        "to_original": torch.full((20,), 2.0),
        "ranks": torch.zeros(20, dtype=torch.int64),
        "reference_ranks": torch.tensor([0, 3]).repeat_interleave(10),
        "photograph": torch.arange(2).repeat_interleave(10),
    }
    values = {f"pixels/{key}": value for key, value in crops.items() if key != "photograph"}
    measured = calibration.by_space(values | {"photograph": crops["photograph"]})
    # Two photographs: each is drawn twice in a quarter of the resamples.
    assert calibration.table_row(measured, ["pixels"], 3)["ratio, pixels"] == "1.000 [0.500, 1.500]"
    band = calibration.calibration_figure({"a": measured}, 3).axes[2].collections[0]
    assert band.get_datalim(band.axes.transData).y0 == 0  # not 0.3, as for 20 independent images


def test_the_inverted_backbone_is_no_witness(tiny, refusal, monkeypatch):
    backbone = Backbone("resnet10t", weights="random", image_size=32)
    extractor = "featinv.evaluation.witnesses.extractor_backbone"
    monkeypatch.setattr(extractor, lambda name, kind: backbone)
    methods = f"+methods={{a: {{checkpoint: '{tiny('spatial')}'}}}}"
    said = refusal("calibration", *DATA, "~checkpoint", "~methods", methods, "witness=lite0")
    assert "'lite0' cannot be the witness, since it is the backbone that is inverted" in said
