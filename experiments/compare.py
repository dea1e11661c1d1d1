"""Put runs side by side: what differs between their configs, final metrics and curves.

python experiments/compare.py runs=[outputs/sweep] columns=[steps,hours,cost] price=0.05

A run is the folder of a run of train.py; a folder with such folders in it, as left by a sweep,
stands for all of them. The table and a figure of all curves go to `output`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import harness
from featinv.checkpoints import MODEL_FILE
from featinv.cli.app import run_entry_point
from featinv.cli.train import global_batch_size
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import comparison_figure
from featinv.evaluation.report import headline
from featinv.evaluation.runs import differences, find_runs, load_config
from featinv.training.loggers import curves, logged_hours
from featinv.utils.errors import InputError, unknown
from settings import as_list

CURVES = ("train/loss", "val/loss", "val/feature_cosine")


def progress(folder: Path, price: float | None = None) -> dict[str, str]:
    """Return a run's cells: how far it got, its scores, and its cost at a price per hour."""
    history = curves(folder)
    cells = {"status": "finished"}
    if not (folder / MODEL_FILE).is_file():
        steps = max((step + 1 for points in history.values() for step, _ in points), default=0)
        cells["status"] = f"unfinished: {steps} steps"
    elif not (folder / "metrics.json").is_file():
        cells["status"] = "not evaluated"
    if spent := effort(folder, OmegaConf.load(folder / "config.yaml")):
        hours = spent["hours"]
        cells |= {"steps": str(spent["steps"]), "hours": f"{hours:.2f}"}
        if "images" in spent:
            cells["images/s"] = f"{spent['images'] / 3600 / hours:.1f}"
        if price is not None:
            cells["cost"] = f"{hours * price:.3f}"
    if points := history.get("val/loss"):
        ends = dict.fromkeys((points[0], points[-1]))  # may be the same
        cells["val/loss"] = ", ".join(f"{loss:.3f} (step {step + 1})" for step, loss in ends)
    if points := history.get("val/feature_cosine"):
        cells["val/feature_cosine"] = f"{points[-1][1]:.3f}"
    if cells["status"] == "finished":
        cells |= final_metrics(folder / "metrics.json")
    return cells


def effort(run: Path, config: Mapping) -> dict[str, float]:
    """Return the `steps`, `hours` and, unless the config leaves them open, `images` of a training.

    Empty if nothing has been logged.
    """
    points = curves(run).get("train/loss")
    if not points:
        return {}
    spent = {"steps": points[-1][0] + 1, "hours": logged_hours(run)}
    size = global_batch_size(config["trainer"], config["data"]["batch_size"])
    return spent if size is None else spent | {"images": spent["steps"] * size}


def final_metrics(path: Path) -> dict[str, str]:
    """Return the final metrics of a run as cells of the table."""
    try:
        metrics = json.loads(path.read_text())
        seconds = f"{metrics['seconds_per_reconstruction']:.3f}"
        return headline(metrics) | {"s per reconstruction": seconds}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' does not hold the metrics of a run: expected those that train.py wrote."
        ) from error


def choose(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows with the given columns only, in that order."""
    known = list(dict.fromkeys(name for row in rows for name in row if name != "run"))
    for name in columns:
        if name not in known:
            raise unknown("column", name, known)
    return [{name: row[name] for name in ("run", *columns) if name in row} for row in rows]


def main(config: DictConfig) -> None:
    """Write the table of the runs, and draw their curves over each other."""
    price = config.price
    if price is not None and not (isinstance(price, int | float) and 0 <= price < float("inf")):
        raise InputError(f"price is '{price}', expected that of an hour, for example price=0.05.")
    runs = find_runs(as_list(config.runs))
    if not runs:
        raise InputError("There is nothing to compare: expected the folder of a run.")
    above = os.path.commonpath([run.absolute().parent for run in runs])
    names = [os.path.relpath(run, above) for run in runs]
    differing = differences([load_config(run) for run in runs])
    rows = [
        {"run": name} | {key: column[i] for key, column in differing.items()} | progress(run, price)
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    rows = rows if config.columns is None else choose(rows, as_list(config.columns))
    history = {name: curves(run) for name, run in zip(names, runs, strict=True)}
    save_figure(comparison_figure(history, CURVES), f"{config.output}/curves.png")
    harness.publish(rows, f"{len(runs)} runs below {above}.", config)


if __name__ == "__main__":
    run_entry_point(main, "compare")
