import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import mistake, run
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from featinv.cli.sweeps import NAME_LENGTH, job_folder
from featinv.cli.user_errors import PLUGINS

# A stand-in for train.py that takes no time: it notes its arguments, and its seed says how it ends.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

def task(config):
    raise AssertionError("a sweep runs its jobs as processes")

if __name__ == "__main__":
    values = dict(argument.split("=", 1) for argument in sys.argv[1:])
    folder = Path(values.get("output", values.get("resume")).strip("'"))
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    if "resume" not in values:
        seed = int(values.get("seed", 0))
        if seed == 2:
            sys.exit("progress\\rError: Seed 2 is bad.\\nwandb: done")
        if seed == 7:
            print("[rank1]: RuntimeError: boom", file=sys.stderr)
            sys.exit("[rank0]: RuntimeError: Connection closed by peer")
        if seed == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 5:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
            sys.exit(5)
        if seed == 8:
            os.kill(os.getppid(), signal.SIGINT)  # Ctrl-C interrupts the sweep and its job
            time.sleep(0.5)
            (folder / "saved").touch()
            sys.exit(130)
    cosine = values.get("model.optimizer.lr", 0)
    line = {"step": 0, "val/feature_cosine": float(cosine)}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
"""


@pytest.fixture
def sweep(tmp_path, capsys, monkeypatch) -> Callable:
    """Run a sweep of the stand-in; return its exit code and the rows of its table."""
    script = tmp_path / "stand_in.py"
    script.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("stand_in", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.syspath_prepend(tmp_path)

    def sweep(*overrides: str) -> tuple[int, list[list[str]]]:
        capsys.readouterr()
        code = 0
        try:
            run("train", "-m", *overrides, task=module.task)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr().out.splitlines()
        rows = [line.strip("| ").split("|") for line in printed if line.startswith("|")]
        return code, [[cell.strip() for cell in row] for row in rows[2:]]

    return sweep


def calls(folder: Path) -> list[dict[str, str]]:
    """Return the overrides of each command that was started for a job."""
    parser = OverridesParser.create()
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    lines = [[argument for argument in line if argument[:2] != "--"] for line in lines]
    return [
        {o.get_key_element(): o.value() for o in parser.parse_overrides(line)} for line in lines
    ]


def test_each_job_runs_in_a_folder_named_by_what_differs(sweep, tmp_path):
    output = tmp_path / "sweep"
    overrides = ["sampler.num_steps=3", "conditioning=spatial,pooled", "seed=0,1"]
    code, rows = sweep(f"output={output}", *overrides)
    names = [f"conditioning-{c}+seed-{s}" for c in ("pooled", "spatial") for s in (0, 1)]
    jobs = [name.replace("-", "=").replace("+", " ") for name in names]
    assert code == 0
    assert rows == [[j, "finished", f"{output}/{n}"] for j, n in zip(jobs, names, strict=True)]
    assert {path.name for path in output.iterdir() if path.is_dir()} == set(names)
    assert calls(output / names[1]) == [
        {
            "sampler.num_steps": 3,
            "conditioning": "pooled",
            "seed": 1,
            "output": f"{output}/{names[1]}",
        }
    ]
    assert rows[0][0] in (output / "jobs.md").read_text()


def test_paths_lists_and_quotes_in_a_sweep(sweep, tmp_path):
    values = ["a/b", "a b", "[1,2]", "don't"]
    choices = ",".join(["a/b", "'a b'", "[1,2]", r"'don\'t'"])
    code, rows = sweep(f"output='{tmp_path}/my sweep'", f"+note={choices}")
    assert code == 0 and len(rows) == 4
    found = [calls(Path(row[2]))[0] for row in rows]
    assert sorted(map(str, values)) == sorted(
        str(call["+note"]).replace(", ", ",") for call in found
    )
    assert [call["output"] for call in found] == [row[2] for row in rows]


def test_job_folders_are_valid_and_need_no_quotes():
    overrides = [
        "a=b/c,d=[1,2]",
        "a=b%2Fc,d=[1,2]",
        "x='ü ~ä'",
        ",".join(f"k{i}=1" for i in range(60)),
        ",".join(f"k{i}=1" for i in range(61)),
    ]
    names = [job_folder(text) for text in overrides]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) == NAME_LENGTH
    for name in names:
        override = OverridesParser.create().parse_override(f"checkpoint=runs/{name}")
        assert override.value() == f"runs/{name}" and "/" not in name


def test_a_users_config_reaches_the_jobs(sweep, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    flags = [f"--config-dir={own}", "--config-name=mine"]
    (row,) = sweep(*flags, f"output={tmp_path}/sweep", "conditioning=pooled")[1]
    (line,) = (Path(row[2]) / "calls.jsonl").read_text().splitlines()
    configs = []

    def task(config):
        configs.append(config)

    run("train", *json.loads(line), task=task)
    assert (configs[0].seed, configs[0].conditioning, configs[0].output) == (7, "pooled", row[2])


# How jobs end


def test_failed_jobs_are_listed_and_do_not_stop_the_others(sweep, tmp_path):
    output = tmp_path / "sweep"
    code, rows = sweep(f"output={output}", "seed=2,4,5,6,7")
    assert code == 1
    assert [row[1] for row in rows] == [
        "failed: Seed 2 is bad.",
        "failed: It was ended by SIGKILL.",
        "failed: It ended with exit code 5.",
        "finished",
        "failed: RuntimeError: boom",
    ]
    code, rows = sweep(f"output={output}", "seed=2,5,6")
    assert code == 1
    assert [row[1] for row in rows] == ["failed: Seed 2 is bad.", "finished", "skipped"]
    assert [len(calls(output / f"seed-{seed}")) for seed in (2, 4, 5, 6)] == [2, 1, 2, 1]
    assert calls(output / "seed-5")[1] == {"resume": f"{output}/seed-5"}  # it had a checkpoint


def test_a_finished_job_is_not_mistaken_for_one_with_other_values(sweep, tmp_path):
    output = tmp_path / "sweep"
    sweep(f"output={output}", "trainer.max_steps=5", "seed=0,2")
    # the job of seed 2 had no progress to lose
    code, rows = sweep(f"output={output}", "trainer.max_steps=6", "seed=0,2,6")
    assert code == 1
    assert [row[1].split(")")[0] for row in rows] == [
        "failed: The folder holds a job with other values (trainer.max_steps=5",
        "failed: Seed 2 is bad.",
        "finished",
    ]
    code, rows = sweep(f"output={output}", "trainer.max_steps=5", "seed=0,1", "logger=wandb")
    assert code == 0  # a logger is not one of a job's values
    assert [row[1] for row in rows] == ["skipped", "finished"]
    assert calls(output / "seed-1")[0]["logger.wandb.group"] == "sweep"


def test_an_interruption_stops_the_sweep_once_its_job_has_ended(sweep, tmp_path):
    # A suite in the background may have been started with interruptions ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _ = sweep(f"output={tmp_path}", "seed=8,1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert (tmp_path / "seed-8" / "saved").exists() and not (tmp_path / "seed-1").exists()


# Sweepers and launchers


def test_optuna_maximises_the_feature_cosine(sweep, tmp_path):
    overrides = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=0"]
    overrides += ["model.optimizer.lr=interval(0.1,0.9)", f"output={tmp_path}/sweep"]
    code, rows = sweep(*overrides)
    assert code == 0 and [row[1] for row in rows] == 2 * ["finished"]
    tried = [float(row[0].split("=")[1]) for row in rows]
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == best.best_params["model.optimizer.lr"] == max(tried)
    code, rows = sweep(*overrides)
    assert code == 0 and [row[1] for row in rows] == 2 * ["skipped"]


def test_optuna_goes_on_after_jobs_that_failed(sweep, tmp_path):
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"]
    code, rows = sweep(*optuna, "seed=choice(2,2)", f"output={tmp_path}/all")
    assert code == 1  # without the traceback of Optuna, which finds no best trial
    assert [row[1] for row in rows] == ["failed: Seed 2 is bad."]


@pytest.mark.slow  # each of its processes imports everything
def test_joblib_runs_jobs_in_other_processes(sweep, tmp_path):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, rows = sweep(*launcher, f"output={tmp_path}/sweep", "seed=0,2")
    assert code == 1
    assert [row[1] for row in rows] == ["finished", "failed: Seed 2 is bad."]


def test_a_plugin_that_is_not_installed(tmp_path, capsys, monkeypatch):
    for option in PLUGINS:  # all are installed
        group, name = option.removeprefix("hydra/").split("/")
        monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{name}.yaml")
    choice = "hydra/sweeper=optuna"
    sentence = mistake(capsys, "train", "-m", choice, f"output={tmp_path}", "seed=1,2")
    assert sentence == f"{choice} needs another package: pip install hydra-optuna-sweeper"
