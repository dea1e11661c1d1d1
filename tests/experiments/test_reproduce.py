import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers import ROOT, mistake, run
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from experiments import reproduce
from featinv.cli.app import CONFIGS

# Steps that take no time: python -c "..." writes a file, or fails.
WRITE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True, exist_ok=True); p.write_text(sys.argv[2])"  # noqa: E501


def write(file: str, text: str, **more) -> dict:
    return {
        "says": "a table",
        "command": f"python -c '{WRITE}' {file} {text}",
        "makes": file,
        **more,
    }


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    folders = [f"output={tmp_path / 'work'}", f"results={tmp_path / 'results'}"]
    return ["scale=small", "root=DATA", "seed=3", *folders]


@pytest.fixture
def plan_of(monkeypatch) -> Callable:
    """Put steps in the place of the plan's."""

    def plan_of(**steps: dict) -> None:
        read = reproduce.read_plan
        monkeypatch.setattr(
            reproduce,
            "read_plan",
            lambda c: read(OmegaConf.merge(c, {"plan": None}, {"plan": steps})),
        )

    return plan_of


def test_steps_are_done_once_and_their_results_put_together(tmp_path, overrides, plan_of):
    first = write("${output}/a/table.md", "seed-${seed}", results=["table.md"])
    second = write("${output}/b/model.safetensors", "weights", needs=["first"])
    plan_of(first=first, second=second)
    run("reproduce/reproduce", *overrides, task=reproduce.main)
    assert (tmp_path / "results" / "first" / "table.md").read_text() == "seed-3"
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "## first: a table" in readme and "seed-3" in readme and "second" not in readme
    assert f"{datetime.now(UTC).date()}" in readme
    said = (tmp_path / "work" / "steps.md").read_text()
    assert said.count("made in") == 2
    made = (tmp_path / "work" / "a" / "table.md").stat().st_mtime_ns
    run("reproduce/reproduce", *overrides, task=reproduce.main)
    assert (tmp_path / "work" / "a" / "table.md").stat().st_mtime_ns == made
    assert (tmp_path / "work" / "steps.md").read_text().count("was there") == 2


def test_some_of_the_steps_leave_the_results_of_the_others(tmp_path, overrides, plan_of):
    steps = {n: write(f"${{output}}/{n}/table.md", n, results=["table.md"]) for n in ("a", "b")}
    plan_of(**steps)
    run("reproduce/reproduce", *overrides, task=reproduce.main)
    run("reproduce/reproduce", *overrides, "only=[b]", task=reproduce.main)
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "## a: a table" in readme and "## b: a table" in readme


def test_no_unfamiliar_images_means_none():
    with initialize_config_dir(str(CONFIGS / "reproduce"), version_base=None):
        config = compose("reproduce", ["root=DATA"])
    command = reproduce.read_plan(config)["robustness"].command
    assert " out_of_distribution=null " in command


def test_a_failure_stops_only_what_needs_it(tmp_path, overrides, plan_of, capsys):
    bad = {"says": "bad", "command": "python -c 'raise SystemExit(\"boom\")'", "makes": "nowhere"}
    plan_of(
        bad=bad,
        after=write("${output}/a/table.md", "x", needs=["bad"]),
        other=write("${output}/b/table.md", "x", results=["table.md"]),
    )
    said = mistake(capsys, "reproduce/reproduce", *overrides, task=reproduce.main)
    assert "2 of 3 steps failed: bad, after" in said
    ended = (tmp_path / "work" / "steps.md").read_text()
    assert "failed with exit code 1: boom" in ended and "it needs bad" in ended
    assert (tmp_path / "results" / "other" / "table.md").is_file()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("scale=smal", "Unknown scale config 'smal': did you mean small?"),
        ("step=5", "Unknown config key 'step': did you mean"),
        ("root=null", "The data are missing: expected root=PATH"),
        ("only=[secnd]", "Unknown step 'secnd'"),
        ("steps=0", "steps is 0: expected an integer of at least 1"),
    ],
)
def test_bad_input(override, sentence, overrides, plan_of, capsys):
    plan_of(second=write("${output}/a/table.md", "x"))
    assert sentence in mistake(
        capsys, "reproduce/reproduce", *overrides, override, task=reproduce.main
    )


def test_the_papers_plan_is_printed_with_its_hours(tmp_path, capsys):
    run(
        "reproduce/reproduce", "scale=paper", "root=DATA", f"output={tmp_path}", task=reproduce.main
    )
    said = capsys.readouterr().out
    assert "experiment=fast backbone=resnet50 data.root=DATA" in said
    assert "200 TFLOP/s, an assumption" in said
    run(
        *(
            "reproduce/reproduce",
            "scale=paper",
            "root=DATA",
            f"output={tmp_path}",
            "gpu_tflops=400",
        ),
        task=reproduce.main,
    )
    total, half = (
        float(next(line for line in text.splitlines() if line.startswith("| all")).split("|")[2])
        for text in (said, capsys.readouterr().out)
    )
    assert total == pytest.approx(2 * half, rel=0.05)


def test_hours_are_those_of_the_benchmark():
    row = {"way": "featinv", "precision": "bf16-mixed"}
    training = row | {"batch": 4, "seconds": {"step": 2.0}, "tflops": 50.0}
    drawing = row | {"scheduler": "dpm_solver", "steps": 20, "seconds_per_image": 3.0}
    benchmark = {"measure_training": [training], "measure_sampling": [drawing]}
    assert reproduce.seconds_per_image(benchmark, None) == (0.5, 3.0)
    assert reproduce.seconds_per_image(benchmark, 100.0) == (0.25, 1.5)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_command_of_the_plans_composes(scale):
    """Its script is there, and takes each of its values."""
    with initialize_config_dir(str(CONFIGS / "reproduce"), version_base=None):
        config = compose("reproduce", [f"scale={scale}", "root=DATA", "unfamiliar=DATA/x.tar"])
    steps = reproduce.read_plan(config)
    assert len(steps) > 10
    for step in steps.values():
        python, script, *values = reproduce.shlex.split(step.command)
        assert python == "python" and (ROOT / script).is_file()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base=None):
            composed = compose(Path(script).stem, values)
        assert Path(composed.output) in Path(step.makes).parents, step.name


def test_the_default_benchmark_is_there():
    with initialize_config_dir(str(CONFIGS / "reproduce"), version_base=None):
        config = compose("reproduce", ["root=DATA"])
    assert json.loads((ROOT / config.benchmark).read_text())["measure_training"]
