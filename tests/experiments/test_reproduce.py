import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from data.conftest import make_shards
from helpers import ROOT, mistake, run
from omegaconf import OmegaConf

import reproduce
from featinv import InputError
from featinv.backbones import Backbone
from featinv.data import ShardsDataModule
from featinv.utils.pixels import from_uint8
from plans.steps import Plan

# An experiment that takes no time: it writes a table, or fails.
SCRIPT = """
import sys, pathlib
told = dict(value.split("=") for value in sys.argv[1:])
if told["text"] == "boom":
    raise SystemExit("boom")
folder = pathlib.Path(told["output"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "table.md").write_text(told["text"] + " seed " + told["seed"])
"""


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    folders = [f"output={tmp_path / 'work'}", f"results={tmp_path / 'results'}"]
    return ["scale=small", "root=DATA", "seed=3", *folders]


@pytest.fixture(autouse=True)
def plan_of(monkeypatch, tmp_path) -> Callable:
    """Replace the small plan by steps that write a text: name -> (text, *dependencies)."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "write.py").write_text(SCRIPT)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)

    def plan_of(**steps: tuple[str, ...]) -> None:
        def make(config):
            plan = Plan(config, {})
            for name, (text, *needs) in steps.items():
                after = tuple(plan[needed] for needed in needs)
                plan.add(name, "write", {"text": text}, "a table", after=after)
            return plan

        monkeypatch.setitem(reproduce.PLANS, "small", make)

    return plan_of


def reproduced(*overrides: str) -> None:
    run("reproduce/reproduce", *overrides, task=reproduce.main)


def test_steps_run_once_and_a_failure_stops_only_what_needs_it(
    tmp_path, overrides, plan_of, capsys
):
    plan_of(first=("one",), bad=("boom",), after=("x", "bad"), second=("two", "first"))
    said = mistake(capsys, "reproduce/reproduce", *overrides, task=reproduce.main)
    assert "2 of 4 steps failed: bad, after" in said
    ended = (tmp_path / "work" / "steps.md").read_text()
    assert "failed with exit code 1: boom" in ended and "it needs bad" in ended
    assert ended.count("made in") == 2
    assert (tmp_path / "results" / "first" / "table.md").read_text() == "one seed 3"
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "## first: a table" in readme and "two seed 3" in readme and "## bad" not in readme
    table = tmp_path / "work" / "first" / "table.md"
    before = table.stat().st_mtime_ns
    reproduced(*overrides, "only=fir*")
    assert table.stat().st_mtime_ns == before
    assert (tmp_path / "work" / "steps.md").read_text().count("already done") == 1
    assert (tmp_path / "results" / "README.md").read_text() == readme


def test_the_readme_keeps_what_another_machine_made(tmp_path, overrides, plan_of):
    plan_of(first=("one",), second=("two",))
    reproduced(*overrides, "only=[first]", f"output={tmp_path / 'elsewhere'}")
    reproduced(*overrides, "only=[second]")
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "one seed 3" in readme and "two seed 3" in readme


def test_steps_are_chosen_by_patterns():
    plan = {"first": 1, "second": 2, "fifth": 3}
    assert reproduce.choose(plan, None) == plan
    assert reproduce.choose(plan, ["f*", "fifth"]) == {"first": 1, "fifth": 3}
    with pytest.raises(InputError, match="Unknown step 'secnd': did you mean second"):
        reproduce.choose(plan, ["secnd"])


def test_the_data_are_needed(overrides, capsys):
    said = mistake(capsys, "reproduce/reproduce", *overrides, "root=null", task=reproduce.main)
    assert "The data are missing: expected root=PATH" in said


def test_the_papers_plan_is_printed_where_there_is_no_gpu(monkeypatch, overrides, capsys):
    monkeypatch.undo()  # the real plan and benchmark
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    reproduced(*overrides, "scale=paper")
    said = capsys.readouterr().out
    assert "experiment=paper" in said and "python experiments/reconstruction.py" in said
    (total,) = (line.split("|")[2] for line in said.splitlines() if line.startswith("| all"))
    assert float(total) > 0


def test_hours_are_those_of_the_benchmark(tmp_path):
    row = {"way": "featinv", "precision": "bf16-mixed"}
    training = row | {"batch": 4, "seconds": {"step": 2.0}, "tflops": 50.0}
    drawing = row | {"scheduler": "dpm_solver", "steps": 20, "seconds_per_image": 3.0}
    benchmark = {"measure_training": [training], "measure_sampling": [drawing]}
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark))  # the plan's ROOT is tmp_path

    def seconds(gpu_tflops: dict | None) -> list[float]:
        values = {"recipe": "fast", "benchmark": "benchmark.json", "gpu_tflops": gpu_tflops}
        return [3600 * hours for hours in reproduce.gpu_hours(OmegaConf.create(values))[:2]]

    assert seconds(None) == pytest.approx([0.5, 3.0])
    assert seconds({"fast": 100.0}) == pytest.approx([0.25, 1.5])


@pytest.mark.slow
@torch.no_grad()
def test_the_papers_plan_runs_to_its_end(stable_diffusion, tmp_path, monkeypatch, capsys):
    """Two steps of every training, on narrow networks, and four images of every experiment."""
    monkeypatch.undo()
    for name, counts in {
        "imagenette-train": [4, 4],
        "imagenette-val": [4, 4],
        "other": [4],
    }.items():
        make_shards(tmp_path, name, counts)
    backbone = Backbone("resnet10t", weights="random", image_size=64)
    data = ShardsDataModule(
        root=str(tmp_path), val_shards="imagenette-val-*.tar", image_size=64, batch_size=4
    )
    seen = backbone.classify(from_uint8(next(iter(data.test_dataloader()))["image"])).argmax(1)
    train = f"model.unet.path: {stable_diffusion}, data.image_size: 64, data.batch_size: 2"
    small = [
        "scale=paper",
        "dry_run=false",
        f"root={tmp_path}",
        f"out_of_distribution={tmp_path}/other-0000.tar",
        "dataset=imagenette",
        "max_steps=2",
        "max_images=4",
        "image_size=32",
        "backbones=[resnet10t_random,efficientnet_lite0]",
        "backbone=resnet10t_random",
        "layers=[layer2]",
        f"train={{{train}}}",
        f"labels=[{int(seen[0])}]",
        "num_concepts=3",
        "extractors=[]",
        f"output={tmp_path / 'work'}",
        f"results={tmp_path / 'results'}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "experiments" / "reproduce.py"), *small]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout[-9000:]}{ended.stderr[-3000:]}"
    rows = (tmp_path / "work" / "steps.md").read_text().splitlines()[2:]
    ends = [row.split("|")[2].strip() for row in rows if row.startswith("|")]
    assert len(ends) == 19 and all(end.startswith("made in") for end in ends)
    readme = (tmp_path / "results" / "README.md").read_text()
    for name in ("gallery", "reconstruction", "robustness_efficientnet_lite0", "frontier"):
        assert f"## {name}: " in readme
    assert (tmp_path / "results" / "gallery" / "gallery.png").is_file()
