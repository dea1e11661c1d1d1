import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import wandb

from featinv.training import loggers
from featinv.training.loggers import (
    FileLogger,
    RobustWandbLogger,
    curves,
    finish_wandb,
    logged_hours,
    make_wandb_logger,
    read_history,
)


def table(folder) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_call_is_a_line_and_each_step_a_row(tmp_path):
    logger = FileLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5}, step=0)
    logger.log_metrics({"train/loss": float("nan")}, step=1)
    logger.log_metrics({"val/loss": 2.0}, step=1)
    logger.finalize("success")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] >= 0 for line in lines)
    assert [(line["step"], line.get("val/loss")) for line in lines] == [
        (0, None),
        (1, None),
        (1, 2),
    ]
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "seconds", "train/loss", "val/loss"]
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("0", "0.5", ""),
        ("1", "nan", "2.0"),
    ]


def test_repeated_steps_replace_their_first_attempt(tmp_path):
    for losses in ({0: 9.0, 1: 8.0, 2: 7.0}, {1: 1.0, 2: 2.0, 3: 3.0}):
        logger = FileLogger(tmp_path)  # a new process
        for step, loss in losses.items():
            logger.log_metrics({"train/loss": loss}, step=step)
        logger.finalize("success")
    assert [float(row["train/loss"]) for row in table(tmp_path)] == [9, 1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_the_hours_of_a_run_are_summed_over_its_resumptions(tmp_path):
    stretches = [10, 3600, 7200], [5, 1800]  # repeated steps count twice
    lines = [{"step": 0, "seconds": seconds} for stretch in stretches for seconds in stretch]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert logged_hours(tmp_path) == 2.5
    # Killed soon, and resumed from before: the step falls, though the clock does not.
    lines = [{"step": 9, "seconds": 1800}, {"step": 5, "seconds": 3600}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert logged_hours(tmp_path) == 1.5
    assert logged_hours(tmp_path / "nothing") == 0


def test_half_a_line_of_a_killed_process_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n{"step": 1, "tr')
    FileLogger(tmp_path).log_metrics({"train/loss": 2.0}, step=1)
    assert [row["train/loss"] for row in read_history(tmp_path)] == [1.0, 2.0]


def test_curves_are_sorted_points_of_names_with_a_slash(tmp_path):
    assert read_history(tmp_path) == [] and curves(tmp_path) == {}
    logger = FileLogger(tmp_path)
    for step in (2, 0, 1):
        logger.log_metrics({"train/loss": step / 10, "epoch": 0, "train/loss_epoch": 1}, step=step)
    assert curves(tmp_path) == {"train/loss": [(0, 0.0), (1, 0.1), (2, 0.2)]}


# Weights & Biases


@pytest.mark.parametrize(
    ("mode", "key", "netrc", "offline"),
    [
        (None, None, None, True),
        (None, "k" * 40, None, False),
        (None, None, ("user", "k"), False),
        ("online", None, None, False),
    ],
)
def test_runs_are_offline_without_a_key(monkeypatch, tmp_path, mode, key, netrc, offline):
    for name, value in (("WANDB_MODE", mode), ("WANDB_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(loggers, "get_netrc_auth", lambda url: netrc)
    assert make_wandb_logger(tmp_path, project="p")._offline == offline
    assert make_wandb_logger(tmp_path, offline=not offline)._offline != offline


class Broken:
    id = "abc"

    def log(self, *args, **options) -> None:
        raise ConnectionError("the network is gone")


def test_an_error_of_wandb_is_logged_once(tmp_path, caplog):
    logger = RobustWandbLogger(save_dir=tmp_path, project="p")
    logger._experiment = Broken()
    for step in range(3):
        logger.log_metrics({"train/loss": 0.5}, step=step)
    logger.log_image("grid", [np.zeros((4, 4, 3), dtype=np.uint8)])
    failure = "Weights & Biases failed, the run continues (ConnectionError: the network is gone)"
    assert [record.message for record in caplog.records] == [failure]


def test_a_run_is_logged_offline_if_wandb_cannot_be_reached(monkeypatch, tmp_path, caplog):
    modes = []

    def init(mode="online", **options):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no answer")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    logger = RobustWandbLogger(save_dir=tmp_path, project="p")
    assert isinstance(logger.experiment, Broken) and logger.experiment is logger.experiment
    assert modes == ["online", "offline"]
    assert "CommError: no answer" in caplog.text
    assert (tmp_path / "wandb_id.txt").read_text() == "abc\n"


def test_a_run_continues_if_wandb_fails_even_offline(monkeypatch, tmp_path, caplog):
    def fail(**options):
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", fail)
    logger = RobustWandbLogger(save_dir=tmp_path, project="p")
    logger.log_metrics({"train/loss": 0.5}, step=0)
    logger.experiment.log({})
    assert not (tmp_path / "wandb_id.txt").exists()
    monkeypatch.setattr(wandb, "run", SimpleNamespace(dir="folder/files", offline=True))
    monkeypatch.setattr(wandb, "finish", fail)
    caplog.clear()
    finish_wandb(failed=False)
    assert "OSError: no room" in caplog.text
