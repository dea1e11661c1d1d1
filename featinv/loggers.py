"""Loggers: JSON lines and CSV files always, Weights & Biases by configuration."""

import csv
import json
import os
import time
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from requests.utils import get_netrc_auth

HISTORY_FILE = "metrics.jsonl"


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
    path = Path(folder) / HISTORY_FILE
    rows: dict[int, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a run that was killed may leave half a line
            continue
        rows.setdefault(entry["step"], {}).update(entry)
    return [rows[step] for step in sorted(rows)]


def curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (optimiser step, value) points of what a run logged."""
    curves: dict[str, list] = {}
    for row in read_history(folder):
        for name, value in row.items():
            if "/" in name and not name.endswith("_epoch"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def make_wandb_logger(folder: str, offline: bool | None = None, **options: object) -> WandbLogger:
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
    logger = WandbLogger(save_dir=folder, offline=offline, **options)
    logger._wandb_init.pop("anonymous", None)  # W&B has dropped it, and warns of it at every start
    return logger
