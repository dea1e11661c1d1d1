import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import mistake, run, tiny_run
from safetensors.torch import save_file

from experiments import reconstruction
from experiments.harness import find_models

DATA = ["data=photos", "data.crops_per_photo=1", "num_images=3", "num_samples=2"]


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with two models, one of them in a folder of its own, and a prior."""
    folder = tmp_path / "runs"
    for name, conditioning in {"a": "spatial", "sub/b": "pooled", "prior": "none"}.items():
        shutil.copytree(tiny_run(f"conditioning={conditioning}"), folder / name)
    return folder


def measure(runs: Path, output: Path, *overrides: str) -> list[dict]:
    checkpoints = f"checkpoints=[{runs}]"
    overrides = [checkpoints, *DATA, f"output={output}", *overrides]
    run("reconstruction", *overrides, task=reconstruction.main)
    with (output / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_model_is_a_row_and_every_backbone_has_its_bounds(runs, tmp_path, capsys):
    rows = measure(runs, tmp_path / "out")
    names = [row["model"] for row in rows]
    assert names == ["a (spatial)", "b (pooled)", "ceiling", "codec", "floor"]
    metrics = json.loads((tmp_path / "out" / "b" / "metrics.json").read_text())
    cosine = metrics["rows"]["reconstruction"]["spatial_cosine"]["mean"]
    assert rows[1]["spatial cosine ↑"].startswith(f"{cosine:.3f} [")
    best = metrics["rows"]["best"]["spatial_cosine"]["mean"]
    assert best >= cosine and rows[1]["best of S ↑"].startswith(f"{best:.3f} [")
    ceiling = metrics["rows"]["ceiling"]["relative_l2"]["mean"]
    assert rows[2]["relative L2 ↓"].startswith(f"{ceiling:.3f} [")
    page = (tmp_path / "out" / "table.md").read_text()
    assert "3 images, 2 samples each, seed 0" in page
    assert page.split("\n\n")[0] in capsys.readouterr().out
    assert "experiments/reconstruction.py" in page
    assert (tmp_path / "out" / "table.tex").read_text().count(r"\\") == 1 + len(rows)


def test_fewer_images_than_asked_for_are_enough(runs, tmp_path):
    measure(runs, tmp_path / "out", "num_images=400")  # the photographs make three
    again = measure(runs, tmp_path / "out", "num_images=400")
    assert len(again) == 5


def test_the_scores_of_other_weights_are_not_taken(runs, tmp_path, capsys):
    measure(runs / "a", tmp_path / "out")
    shutil.copytree(tiny_run("conditioning=pooled"), runs / "a", dirs_exist_ok=True)
    overrides = [f"checkpoints=[{runs / 'a'}]", *DATA, f"output={tmp_path / 'out'}"]
    said = mistake(capsys, "reconstruction", *overrides, task=reconstruction.main)
    assert "was made with weights=" in said


def test_a_classifier_beside_the_models_is_not_one_of_them(runs):
    save_file({"weights": torch.zeros(1)}, runs / "sub" / "model.safetensors")
    assert set(find_models(str(runs))) == {"a", "b", "prior"}


def test_the_table_goes_to_wandb(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = measure(runs, tmp_path / "out", "wandb=true")
    (table,) = (tmp_path / "out" / "wandb").rglob("reconstruction*.table.json")
    sent = json.loads(table.read_text())
    assert [dict(zip(sent["columns"], row, strict=True)) for row in sent["data"]] == rows


def test_it_goes_on_with_what_is_missing(runs, tmp_path):
    output = tmp_path / "out"
    first = measure(runs, output)
    files = {name: output / name / "metrics.json" for name in ("a", "b")}
    text = files["a"].read_text()
    files["a"].write_text(text.replace('"num_images": 3', '"num_images": 3, "kept": 1'))
    files["b"].unlink()
    again = measure(runs, output)
    assert "kept" in files["a"].read_text() and files["b"].exists()
    for row, other in zip(first, again, strict=True):
        del row["s per image"], other["s per image"]
        assert row == other


def test_results_of_other_settings_are_not_mixed(runs, tmp_path, capsys):
    measure(runs, tmp_path / "out")
    overrides = [f"checkpoints=[{runs}]", *DATA, f"output={tmp_path / 'out'}", "num_samples=1"]
    said = mistake(capsys, "reconstruction", *overrides, task=reconstruction.main)
    assert "was made with num_samples=2, not 1: expected another output" in said


def test_bad_paths(runs, tmp_path, capsys):
    output = f"output={tmp_path / 'out'}"
    overrides = ["checkpoints=[nowhere]", output]
    said = mistake(capsys, "reconstruction", *overrides, task=reconstruction.main)
    assert said.startswith("There is no model in 'nowhere': expected a run's folder")
    shutil.copytree(runs / "a", runs / "sub" / "a")
    overrides = [f"checkpoints=[{runs}]", output]
    said = mistake(capsys, "reconstruction", *overrides, task=reconstruction.main)
    assert said.startswith("Two models are called 'a'")
    only = f"checkpoints=[{runs / 'prior'}]"
    overrides = [only, *DATA, output]
    said = mistake(capsys, "reconstruction", *overrides, task=reconstruction.main)
    assert said.endswith("only priors.")


def test_shipped_models_and_files_have_names_too(runs):
    assert find_models("imagenette-small") == {"imagenette-small": "imagenette-small"}
    file = runs / "a" / "model.safetensors"
    assert find_models([str(file)]) == {"model": str(file)}
