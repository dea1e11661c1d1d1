import csv
import json
from pathlib import Path

import pytest
from helpers import mistake, run, tiny_run
from PIL import Image

from experiments import depth

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3"]
LAYERS = {"b": "layer2", "a": "last"}  # in another order than their names


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with models of two layers."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for name, layer in LAYERS.items():
        (folder / name).symlink_to(tiny_run(f"backbone.layer={layer}"))
    return folder


def measured(runs: Path, output: Path, *overrides: str) -> list[dict]:
    checkpoints = ",".join(f"{runs / name}/" for name in sorted(LAYERS))
    overrides = [f"checkpoints=[{checkpoints}]", *DATA, f"output={output}", *overrides]
    run("depth", *overrides, task=depth.main)
    with (output / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_layers_stand_from_early_to_late(runs, tmp_path):
    rows = measured(runs, tmp_path / "out", "num_samples=2")
    assert [row["layer"] for row in rows] == ["layer2", "layer4"]
    assert [row["model"] for row in rows] == ["b", "a"]
    assert [row["features"] for row in rows] == ["128 x 8 x 8", "512 x 2 x 2"]
    for row in rows:
        metrics = json.loads((tmp_path / "out" / row["model"] / "metrics.json").read_text())
        scores = metrics["rows"]
        own = {
            "spatial cosine": scores["reconstruction"]["spatial_cosine"],
            "ceiling": scores["ceiling"]["spatial_cosine"],
            "floor": scores["floor"]["spatial_cosine"],
            "top-1 agreement": scores["reconstruction"]["top1_agreement"],
            "PSNR (dB)": scores["reconstruction"]["psnr"],
            "diversity": scores["reconstruction"]["diversity"],
        }
        for title, values in own.items():
            expected = f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
            assert row[title] == expected
    page = (tmp_path / "out" / "table.md").read_text()
    assert "3 images, 2 sample(s) each, seed 0" in page and "experiments/depth.py" in page
    assert "- layer2: spatial conditioning; dpm_solver, 2 steps" in page
    for name in ("curves", "pictures"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 50


def test_one_sample_has_no_spread_and_the_scores_are_kept(runs, tmp_path):
    rows = measured(runs, tmp_path / "out", "num_samples=1")
    assert all("diversity" not in row for row in rows)
    made = (tmp_path / "out" / "a" / "metrics.json").stat().st_mtime_ns
    assert measured(runs, tmp_path / "out", "num_samples=1") == rows
    assert (tmp_path / "out" / "a" / "metrics.json").stat().st_mtime_ns == made


def refused(capsys, tmp_path: Path, *overrides: str) -> str:
    overrides = [*DATA, f"output={tmp_path / 'out'}", *overrides]
    return mistake(capsys, "depth", *overrides, task=depth.main)


def test_other_backbones_and_other_settings_are_refused(runs, tmp_path, capsys):
    other = tiny_run("backbone.name=resnet18")
    (runs / "c").symlink_to(other)
    said = refused(capsys, tmp_path, f"checkpoints=[{runs}/a/,{runs}/c/]")
    assert said.startswith(
        "The models are of several backbones (a: resnet10t at 64 px, c: resnet18"
    )
    assert said.endswith("expected one, at several layers.")
    (runs / "d").symlink_to(tiny_run("conditioning=pooled"))
    said = refused(capsys, tmp_path, f"checkpoints=[{runs}/a/,{runs}/d/]")
    assert said == "'a' and 'd' are both of layer 'layer4': expected one model of each layer."
    (runs / "e").symlink_to(tiny_run("conditioning=none"))
    said = refused(capsys, tmp_path, f"checkpoints=[{runs}/e/]")
    assert said == "'e' is a prior, which does not reconstruct: expected others."
    measured(runs, tmp_path / "out", "num_samples=1")
    checkpoints = f"checkpoints=[{runs}/a/]"
    said = refused(capsys, tmp_path, checkpoints, "num_samples=1", "sampler.num_steps=3")
    assert "was made with sampler={}, not {'num_steps': 3}: expected another output" in said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("checkpoints=[nowhere]", "There is no model in 'nowhere'"),
        ("checkpoints=3", "There is no model in '3'"),
        ("num_pictures=0", "num_pictures is 0: expected an integer of at least 1"),
        ("num_samples=0", "num_samples is 0: expected an integer of at least 1"),
    ],
)
def test_bad_input(override, sentence, tmp_path, capsys):
    assert sentence in refused(capsys, tmp_path, f"checkpoints=[{tiny_run()}]", override)
