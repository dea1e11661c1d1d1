import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers import tiny_run
from PIL import Image

from experiments.compare import differences, find_runs, main
from featinv.evaluation.curves import comparison_figure


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A folder with three real runs, one of which did not end, and a prior."""
    folder = tmp_path / "sweep"
    for conditioning in ("spatial", "pooled", "none"):
        shutil.copytree(tiny_run(f"conditioning={conditioning}"), folder / conditioning)
    unfinished = folder / "unfinished"
    shutil.copytree(folder / "pooled", unfinished)
    (unfinished / "model.safetensors").unlink()
    return folder


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row.pop("run"): row for row in csv.DictReader(file)}


def test_a_sweep_is_put_side_by_side(sweep, tmp_path, capsys):
    output = tmp_path / "compared"
    assert main([str(sweep), f"output={output}"]) == 0
    rows = table(output)
    assert list(rows) == ["none", "pooled", "spatial", "unfinished"]
    metrics = json.loads((sweep / "spatial" / "metrics.json").read_text())
    cosine = {
        row: f"{value['spatial_cosine']['mean']:.3f} [" for row, value in metrics["rows"].items()
    }
    row = rows["spatial"]
    assert list(row) == [
        "conditioning",
        "status",
        "steps",
        "hours",
        "images/s",
        "val/loss",
        "val/feature_cosine",
        "spatial cosine",
        "shuffled",
        "ceiling",
        "top-1 agreement",
        "s per reconstruction",
    ]
    assert (row["conditioning"], row["status"]) == ("spatial", "finished")
    assert row["spatial cosine"].startswith(cosine["reconstruction"])
    assert row["shuffled"].startswith(cosine["shuffled"])
    assert row["ceiling"].startswith(cosine["ceiling"])
    assert row["s per reconstruction"] == f"{metrics['seconds_per_reconstruction']:.3f}"
    seconds = json.loads((sweep / "spatial" / "metrics.jsonl").read_text().splitlines()[-1])[
        "seconds"
    ]
    assert row["steps"] == "2" and row["hours"] == f"{seconds / 3600:.2f}"
    assert float(row["images/s"]) == pytest.approx(2 * 2 / seconds, abs=0.06)  # batches of two
    assert rows["none"]["status"] == "not evaluated"
    assert rows["unfinished"]["status"] == "unfinished: 2 steps"
    assert rows["unfinished"]["spatial cosine"] == ""
    assert (output / "table.md").read_text() in capsys.readouterr().out
    assert (output / "table.tex").read_text().count(r"\\") == 1 + len(rows)
    with Image.open(output / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 10


def test_only_what_runs_compute_is_compared(tmp_path):
    """A run that was moved differs in its paths only: all of its values are the same."""
    shutil.copytree(tiny_run(), tmp_path / "moved")
    text = (tmp_path / "moved" / "config.yaml").read_text()
    (tmp_path / "moved" / "config.yaml").write_text(text.replace(str(tiny_run()), "elsewhere/run"))
    assert main([str(tiny_run()), str(tmp_path / "moved"), f"output={tmp_path}/out"]) == 0
    rows = list(table(tmp_path / "out").values())
    assert len(rows) == 2 and next(iter(rows[0])) == "status"


def test_differences_name_each_value_once_and_all_of_them():
    configs = [
        {"seed": 0, "model.seed": 0, "data.seed": 5, "a.x": 1, "same": 2},
        {"seed": 1, "model.seed": 1, "data.seed": 5, "b.x": 1, "same": 2},
    ]
    assert differences(configs) == {"seed": ["0", "1"], "a.x": ["1", ""], "b.x": ["", "1"]}
    configs[1]["data.seed"] = 6
    assert differences(configs)["data.seed"] == ["5", "6"]


def test_a_class_stands_for_what_others_lack():
    network = {"unet._target_": "UNet", "unet.channels": 8, "lr": 1}
    priors = [{"unet._target_": "load", "unet.path": path, "lr": 2} for path in ("a", "a", "b")]
    classes = {"unet._target_": ["UNet", "load", "load"], "lr": ["1", "2", "2"]}
    assert differences([network, *priors[:2]]) == classes
    assert differences([network, *priors[1:]]) == classes | {"unet.path": ["", "a", "b"]}


def test_runs_are_found_once_and_not_in_what_hydra_and_wandb_keep(tmp_path):
    run = tmp_path / "wandb" / "run"  # above a run, the name means nothing
    for folder in (run, run / ".hydra", run / "wandb" / "offline-run-1" / "files"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    assert find_runs([str(run), str(run)]) == [run]


def test_the_figure_draws_each_run_in_its_colour():
    histories = {
        "first": {"train/loss": [(0, 1.0), (1, 0.5)]},
        "second": {"train/loss": [(0, 2.0)], "val/loss": [(0, 3.0)]},
    }
    figure = comparison_figure(histories, ["train/loss", "val/loss"])
    train, val = figure.axes
    assert [line.get_xydata().tolist() for line in train.lines] == [[[0, 1], [1, 0.5]], [[0, 2]]]
    assert [line.get_xydata().tolist() for line in val.lines] == [[[0, 3]]]
    assert val.lines[0].get_color() == train.lines[1].get_color() != train.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    many = comparison_figure({str(i): {"a": [(0, i)]} for i in range(30)}, ["a"]).axes[0].lines
    assert len({line.get_color() for line in many}) == 30


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", "text"])
def test_files_of_something_else(tmp_path, capsys, name, content):
    shutil.copytree(tiny_run(), tmp_path / "run")
    capsys.readouterr()  # what training said, if it was trained here
    (tmp_path / "run" / name).write_text(content)
    assert main([str(tmp_path / "run"), f"output={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: '{tmp_path}/run/{name}' ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{}/nothing"], "There is no run in '{}/nothing': expected the folder of a run"),
        (["output={}/out"], "There is nothing to compare: expected the folder of a run."),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, sentence):
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {sentence.format(tmp_path)}")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("price=cheap", "price is 'cheap', expected that of an hour, for example price=0.05."),
        ("price=-1", "price is '-1', expected that of an hour"),
        ("price=inf", "price is 'inf', expected that of an hour"),
        ("columns=stepps", "Unknown column 'stepps': did you mean steps"),
    ],
)
def test_bad_columns_and_prices(tmp_path, capsys, argument, sentence):
    run = tiny_run()
    capsys.readouterr()  # what training said, if it was trained here
    assert main([str(run), f"output={tmp_path}/out", argument]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {sentence}")


def test_columns_may_be_chosen_and_hours_cost(sweep, tmp_path):
    told = ["columns=steps,cost,val/loss", "price=3600", f"output={tmp_path}"]
    assert main([str(sweep), *told]) == 0
    row = table(tmp_path)["spatial"]
    assert list(row) == ["steps", "cost", "val/loss"]
    lines = (sweep / "spatial" / "metrics.jsonl").read_text().splitlines()
    assert float(row["cost"]) == pytest.approx(json.loads(lines[-1])["seconds"], abs=0.01)
    found = [(line.get("val/loss"), line["step"] + 1) for line in map(json.loads, lines)]
    told = [f"{loss:.3f} (step {step})" for loss, step in found if loss is not None]
    assert row["val/loss"] == ", ".join(dict.fromkeys([told[0], told[-1]]))


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    run = tiny_run()
    capsys.readouterr()  # what training said, if it was trained here
    (tmp_path / "file").touch()
    assert main([str(run), f"output={tmp_path}/file/out"]) == 2
    assert capsys.readouterr().err.startswith(f"Error: Cannot write '{tmp_path}/file/out/curves")
