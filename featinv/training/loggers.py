"""Loggers: JSON lines and CSV files always, Weights & Biases by configuration."""

import csv
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only
from requests.utils import get_netrc_auth

log = logging.getLogger(__name__)

HISTORY_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"  # the W&B run that a resumed run goes on with


class FileLogger(Logger):
    """Append each logged step to `metrics.jsonl`; write `metrics.csv` from it.

    Unlike Lightning's CSVLogger it goes on where a run was interrupted: what was logged before is
    kept, and steps that are done again after a resume replace their first attempt in the table.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._start = time.monotonic()
        history = self.folder / HISTORY_FILE
        if history.exists() and not history.read_bytes().endswith(b"\n"):
            with history.open("a") as file:  # a run that was killed: end its half line
                file.write("\n")

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "files"

    @property
    def version(self) -> str:
        """Version: there is one pair of files for each run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line: the optimiser step, seconds since the start, and the values."""
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        with (self.folder / HISTORY_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: the config is a file of its own."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the table, one row for each step."""
        rows = read_history(self.folder)
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            with (self.folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """Return what a run logged: one dict for each optimiser step, in order of the steps."""
    rows: dict[int, dict] = {}
    for entry in _entries(folder):
        rows.setdefault(entry["step"], {}).update(entry)
    return [rows[step] for step in sorted(rows)]


def _entries(folder: str | Path) -> Iterator[dict]:
    path = Path(folder) / HISTORY_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # a run that was killed may leave half a line
            yield json.loads(line)


def logged_hours(folder: str | Path) -> float:
    """Return how long a run took, its validations included, over all the stretches it was done in.

    What was logged counts: neither the start of a stretch, nor what was done after its last line.
    """
    total = previous = 0.0
    for entry in _entries(folder):
        seconds = entry.get("seconds", previous)
        total += seconds - previous if seconds >= previous else seconds  # or a stretch began
        previous = seconds
    return total / 3600


def curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (optimiser step, value) points of what a run logged."""
    curves: dict[str, list] = {}
    for row in read_history(folder):
        for name, value in row.items():
            if "/" in name and not name.endswith("_epoch"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def forgiving(method: Callable) -> Callable:
    """Return a method whose errors are a warning: a log is not worth a run."""

    @wraps(method)
    def call(*args, **kwargs) -> object:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if reason not in told:  # or it would be said at every step
                told.add(reason)
                log.warning("Weights & Biases fails, the run goes on (%s)", reason)

    told: set[str] = set()
    return call


class RobustWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, which never stops a run and which a resumed run goes on with.

    If W&B cannot be reached at the start, the run is logged offline.
    """

    @property
    def experiment(self):
        """The W&B run; one that takes everything and does nothing, where there is none."""
        if self._experiment is None and rank_zero_only.rank == 0:
            id_file = Path(self.save_dir) / WANDB_ID_FILE
            if id_file.exists():
                self._wandb_init["id"] = id_file.read_text().strip()
            if self._start() is None and not self._offline:
                self._wandb_init["mode"] = "offline"
                self._start()
            if self._experiment is None:
                self._experiment = DummyExperiment()
            else:
                id_file.write_text(f"{self._experiment.id}\n")
        return super().experiment

    @forgiving
    def _start(self) -> object:
        return super().experiment

    log_hyperparams = forgiving(WandbLogger.log_hyperparams)
    log_metrics = forgiving(WandbLogger.log_metrics)
    log_table = forgiving(WandbLogger.log_table)
    log_image = forgiving(WandbLogger.log_image)
    finalize = forgiving(WandbLogger.finalize)


@forgiving
def finish_wandb(failed: bool) -> None:
    """Close this process' W&B run, if there is one, and say how to send it if it is offline."""
    if wandb.run is None:
        return
    folder, offline = Path(wandb.run.dir).parent, wandb.run.offline
    wandb.finish(exit_code=int(failed))
    if offline:
        log.info("Send this run to W&B with: wandb sync %s", folder)


def make_wandb_logger(
    folder: str, offline: bool | None = None, **options: object
) -> RobustWandbLogger:
    """Return a Weights & Biases logger, offline where there is no key to log in with.

    Args:
        folder: The run's folder; W&B's files go to its subfolder `wandb`.
        offline: `None` means: online if `WANDB_API_KEY` is set or `wandb login` was run.
        options: Further arguments of Lightning's `WandbLogger`: project, name, group, tags, ...
    """
    if offline is None:
        mode = os.environ.get("WANDB_MODE")
        has_key = os.environ.get("WANDB_API_KEY") or get_netrc_auth("https://api.wandb.ai")
        offline = mode == "offline" or (mode is None and not has_key)
    logger = RobustWandbLogger(save_dir=folder, offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # W&B has dropped it, and warns of it at every start
    return logger
