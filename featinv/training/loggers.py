"""Loggers: JSON lines and CSV files, and Weights & Biases."""

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
WANDB_ID_FILE = "wandb_id.txt"  # id of the W&B run, for a resumed run


class FileLogger(Logger):
    """Append what is logged to `metrics.jsonl`; write `metrics.csv` from it at the end.

    Unlike Lightning's CSVLogger, it continues the files of a resumed run; repeated steps replace
    their first attempt in the table.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._start = time.monotonic()
        history = self.folder / HISTORY_FILE
        if history.exists() and not history.read_bytes().endswith(b"\n"):
            with history.open("a") as file:  # end the half line of a killed run
                file.write("\n")

    @property
    def name(self) -> str:
        """What Lightning asks for."""
        return "files"

    @property
    def version(self) -> str:
        """None: each run has one pair of files."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line with the optimiser step, seconds since the start, and the values."""
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        with (self.folder / HISTORY_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: the config has its own file."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the table, one row per step."""
        rows = read_history(self.folder)
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            with (self.folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """Return what a run logged, one dict per optimiser step, in order."""
    rows: dict[int, dict] = {}
    for entry in _entries(folder):
        rows.setdefault(entry["step"], {}).update(entry)
    return [rows[step] for step in sorted(rows)]


def _entries(folder: str | Path) -> Iterator[dict]:
    path = Path(folder) / HISTORY_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # half a line of a killed run
            yield json.loads(line)


def logged_hours(folder: str | Path) -> float:
    """Return how long a run took, including validations and summed over resumptions.

    Time after the last line of each stretch is not counted.
    """
    total = seconds = step = 0
    for entry in _entries(folder):
        before, last = seconds, step
        seconds, step = entry.get("seconds", before), entry["step"]
        resumed = seconds < before or step < last  # the clock restarts
        total += seconds if resumed else seconds - before
    return total / 3600


def curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return a run's metrics as name -> (optimiser step, value) points."""
    curves: dict[str, list] = {}
    for row in read_history(folder):
        for name, value in row.items():
            if "/" in name and not name.endswith("_epoch"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def forgiving(method: Callable) -> Callable:
    """Turn a method's errors into warnings: a failing log must not end a run."""
    known: set[str] = set()

    @wraps(method)
    def call(*args, **kwargs) -> object:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if reason not in known:  # warn once, not at every step
                known.add(reason)
                log.warning("Weights & Biases failed, the run continues (%s)", reason)

    return call


class RobustWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, but it never ends a run, and a resumed run continues its W&B run.

    If W&B cannot be reached at the start, the run is logged offline.
    """

    @property
    def experiment(self):
        """The W&B run, or a dummy if there is none."""
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
    """Close this process's W&B run, if any; log how to send an offline one."""
    if wandb.run is None:
        return
    folder, offline = Path(wandb.run.dir).parent, wandb.run.offline
    wandb.finish(exit_code=int(failed))
    if offline:
        log.info("Send this run to W&B with: wandb sync %s", folder)


def make_wandb_logger(
    folder: str, offline: bool | None = None, **options: object
) -> RobustWandbLogger:
    """Return a Weights & Biases logger, offline if there is no key to log in with.

    Args:
        folder: The run's folder; W&B's files go to its subfolder `wandb`.
        offline: `None` means online if `WANDB_API_KEY` is set or `wandb login` was run.
        options: Further arguments of Lightning's `WandbLogger`: project, name, group, tags, ...
    """
    if offline is None:
        mode = os.environ.get("WANDB_MODE")
        has_key = os.environ.get("WANDB_API_KEY") or get_netrc_auth("https://api.wandb.ai")
        offline = mode == "offline" or (mode is None and not has_key)
    logger = RobustWandbLogger(save_dir=folder, offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # deprecated: W&B warns of it at every start
    return logger
