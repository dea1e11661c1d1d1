import json
import shutil
from pathlib import Path

import pytest
from helpers import tiny_run

from compare import choose
from featinv import InputError
from featinv.evaluation.plots import comparison_figure


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A folder with a real run, and copies as if with another conditioning, of which one ended."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("spatial", "pooled", "none", "unfinished"):
        shutil.copytree(tiny_run(), folder / name)
        config = (folder / name / "config.yaml").read_text()
        own = "spatial" if name == "unfinished" else name
        config = config.replace("conditioning: spatial", f"conditioning: {own}")
        (folder / name / "config.yaml").write_text(config)
    (folder / "none" / "metrics.json").unlink()
    (folder / "unfinished" / "model.safetensors").unlink()
    return folder


def test_a_sweep_is_put_side_by_side(sweep, experiment, tmp_path):
    found = experiment("compare", f"runs=[{sweep}]", output=tmp_path)
    rows = {row.pop("run"): row for row in found}
    assert list(rows) == ["none", "pooled", "spatial", "unfinished"]
    row = rows["spatial"]
    assert list(row)[:5] == ["conditioning", "status", "steps", "hours", "images/s"]
    assert (row["conditioning"], row["status"]) == ("spatial", "finished")
    metrics = json.loads((sweep / "spatial" / "metrics.json").read_text())
    cosine = {name: scores["spatial_cosine"]["mean"] for name, scores in metrics["rows"].items()}
    assert row["cosine"].startswith(f"{cosine['reconstruction']:.3f} [")
    last = json.loads((sweep / "spatial" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["steps"] == "2" and row["hours"] == f"{last['seconds'] / 3600:.2f}"
    images_per_second = 2 * 2 / last["seconds"]  # batches of two
    assert float(row["images/s"]) == pytest.approx(images_per_second, abs=0.06)
    assert rows["none"]["status"] == "not evaluated"
    assert rows["unfinished"]["status"] == "unfinished: 2 steps"
    assert rows["unfinished"]["cosine"] == ""
    assert (tmp_path / "curves.png").is_file()


def test_only_what_runs_compute_is_compared(experiment, tmp_path):
    """A run that was moved differs in its paths only: all of its values are the same."""
    shutil.copytree(tiny_run(), tmp_path / "moved")
    text = (tmp_path / "moved" / "config.yaml").read_text()
    (tmp_path / "moved" / "config.yaml").write_text(text.replace(str(tiny_run()), "elsewhere/run"))
    runs = f"runs=[{tiny_run()},{tmp_path / 'moved'}]"
    rows = experiment("compare", runs, output=tmp_path / "out")
    assert len(rows) == 2 and list(rows[0])[:2] == ["run", "status"]


def test_columns_may_be_chosen_and_hours_cost(sweep, experiment, tmp_path):
    own = ["columns=[steps,cost,val/loss]", "price=3600"]
    rows = experiment("compare", f"runs={sweep}", *own, output=tmp_path)
    row = next(row for row in rows if row["run"] == "spatial")
    assert list(row) == ["run", "steps", "cost", "val/loss"]
    lines = [*map(json.loads, (sweep / "spatial" / "metrics.jsonl").read_text().splitlines())]
    assert float(row["cost"]) == pytest.approx(lines[-1]["seconds"], abs=0.01)
    losses = [
        f"{line['val/loss']:.3f} (step {line['step'] + 1})" for line in lines if "val/loss" in line
    ]
    assert row["val/loss"] == ", ".join(dict.fromkeys([losses[0], losses[-1]]))


@pytest.mark.parametrize(("name", "content"), [("config.yaml", "text"), ("metrics.json", "{")])
def test_files_of_something_else(name, content, refusal, tmp_path):
    shutil.copytree(tiny_run(), tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert refusal("compare", f"runs={tmp_path}/run").startswith(f"'{tmp_path}/run/{name}' ")


def test_an_unknown_column_has_a_nearest_one():
    with pytest.raises(InputError, match="Unknown column 'stepps': did you mean steps"):
        choose([{"run": "a", "steps": "2"}], ["stepps"])


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
    assert len({tuple(line.get_color()) for line in many}) == 30
