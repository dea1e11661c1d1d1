"""Put runs side by side: what differs between their configs, final metrics and curves.

python experiments/compare.py RUN... [output=FOLDER] [columns=steps,hours,cost] [price=0.05]

Each RUN is the folder of a run of train.py, or a folder with such folders in it, as a sweep leaves
it. The table is printed, and written with the curves to FOLDER: table.md, table.tex, table.csv,
curves.png. `columns` are those of the table, in this order; all of them if it is not said. `price`
is what an hour costs, for a column `cost`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from featinv.checkpoints import MODEL_FILE, relocate
from featinv.evaluation.curves import comparison_figure
from featinv.evaluation.figures import save_figure
from featinv.evaluation.tables import csv_table, format_interval, latex_table, markdown_table
from featinv.training.loggers import curves, logged_hours
from featinv.utils.errors import ArgumentParser, InputError, exit_code, unknown

# Parts of a config that say where a run is and who hears of it, not what it computes.
ELSEWHERE = ("output", "resume", "logger")
# Columns of the table: row and metric of metrics.json.
METRICS = {
    "spatial cosine": ("reconstruction", "spatial_cosine"),
    "shuffled": ("shuffled", "spatial_cosine"),
    "ceiling": ("ceiling", "spatial_cosine"),
    "top-1 agreement": ("reconstruction", "top1_agreement"),
}
CURVES = ("train/loss", "val/loss", "val/feature_cosine")


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Return the folders of the runs that are, or lie in, the given folders.

    Raises:
        InputError: There is none in one of them.
    """
    runs: dict[Path, None] = {}  # each once, in order
    for path in map(Path, paths):
        # Hydra and W&B keep configs of their own in a run's folder
        found = {
            file.parent
            for file in path.rglob("config.yaml")
            if not {".hydra", "wandb"} & set(file.relative_to(path).parts)
        }
        if not found:
            raise InputError(
                f"There is no run in '{path}': expected the folder of a run of train.py, with its "
                "config.yaml, or a folder with such folders in it."
            )
        runs |= dict.fromkeys(sorted(found))
    return list(runs)


def load_config(folder: Path) -> dict[str, object]:
    """Return the values of a run's config by their dotted keys, without where the run is."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        config = relocate(config, config["output"], "OUTPUT")
    except (YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"'{folder / 'config.yaml'}' is not the config of a run: expected one that train.py "
            "wrote."
        ) from error
    return flatten({key: value for key, value in config.items() if key not in ELSEWHERE})


def flatten(node: dict, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dicts by their dotted keys."""
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(configs: Sequence[dict[str, object]]) -> dict[str, list[str]]:
    """Return key -> its value in each config, as text, for the keys that differ.

    A config holds some values twice: `seed` is `model.seed` too. The shorter key stands for both.
    Where a part is of another class in some runs, its `_target_` stands for all values that those
    lack and that are the same in the others.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    columns = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(column)) > 1}

    def repeated(key: str) -> bool:
        parts = key.split(".")
        suffixes = [".".join(parts[i:]) for i in range(1, len(parts))]
        return any(columns.get(suffix) == columns[key] for suffix in suffixes)

    def told_by_class(key: str) -> bool:
        if all(key in config for config in configs):
            return False
        parts = key.split(".")
        targets = (".".join([*parts[:i], "_target_"]) for i in range(1, len(parts)))
        classes = [columns[target] for target in targets if target in columns]
        return any(len({*zip(own, columns[key], strict=True)}) == len({*own}) for own in classes)

    return {
        key: column
        for key, column in columns.items()
        if not repeated(key) and not told_by_class(key)
    }


def results(folder: Path, price: float | None = None) -> dict[str, str]:
    """Return the cells that say how far a run got, what it reached, and cost at a price an hour."""
    cells = {}
    history = curves(folder)
    if not (folder / MODEL_FILE).is_file():
        steps = max((step + 1 for points in history.values() for step, _ in points), default=0)
        cells["status"] = f"unfinished: {steps} steps"
    elif not (folder / "metrics.json").is_file():
        cells["status"] = "not evaluated"
    else:
        cells["status"] = "finished"
    if points := history.get("train/loss"):
        steps, hours = points[-1][0] + 1, logged_hours(folder)
        cells |= {"steps": str(steps), "hours": f"{hours:.2f}"}
        if size := global_batch_size(folder):
            cells["images/s"] = f"{steps * size / 3600 / hours:.1f}"
        if price is not None:
            cells["cost"] = f"{hours * price:.3f}"
    if points := history.get("val/loss"):
        ends = dict.fromkeys((points[0], points[-1]))  # the first and the last, perhaps the same
        cells["val/loss"] = ", ".join(f"{loss:.3f} (step {step + 1})" for step, loss in ends)
    if points := history.get("val/feature_cosine"):
        cells["val/feature_cosine"] = f"{points[-1][1]:.3f}"
    if cells["status"] == "finished":
        cells |= load_metrics(folder / "metrics.json")
    return cells


def global_batch_size(folder: Path) -> int | None:
    """Return how many images an optimiser step of a run saw; None if the config does not tell."""
    config = OmegaConf.load(folder / "config.yaml")
    devices = config.trainer.devices
    if not isinstance(devices, int):
        return None
    size = config.data.batch_size * config.trainer.accumulate_grad_batches
    return size * devices * config.trainer.get("num_nodes", 1)


def load_metrics(path: Path) -> dict[str, str]:
    """Return the final metrics of a run as cells of the table."""
    try:
        metrics = json.loads(path.read_text())
        rows = metrics["rows"]
        # there is no other image to compare with if only one was evaluated
        cells = {
            name: format_interval(**rows[row][metric])
            for name, (row, metric) in METRICS.items()
            if row in rows
        }
        return cells | {"s per reconstruction": f"{metrics['seconds_per_reconstruction']:.3f}"}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' does not hold the metrics of a run: expected those that train.py wrote."
        ) from error


def choose(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows with some of their cells only, in the order asked for.

    Raises:
        InputError: No row has such a cell.
    """
    known = list(dict.fromkeys(name for row in rows for name in row if name != "run"))
    for name in columns:
        if name not in known:
            raise unknown("column", name, known)
    return [{name: row[name] for name in ("run", *columns) if name in row} for row in rows]


def compare(
    paths: Sequence[str],
    output: Path,
    columns: Sequence[str] | None = None,
    price: float | None = None,
) -> None:
    """Print and write the table of some runs, and draw their curves over each other."""
    if not paths:
        raise InputError("There is nothing to compare: expected the folder of a run.")
    runs = find_runs(paths)
    above = os.path.commonpath([run.absolute().parent for run in runs])
    names = [os.path.relpath(run, above) for run in runs]
    differing = differences([load_config(run) for run in runs])
    rows = [
        {"run": name}
        | {key: column[i] for key, column in differing.items()}
        | results(runs[i], price)
        for i, name in enumerate(names)
    ]
    rows = rows if columns is None else choose(rows, columns)
    history = {name: curves(run) for name, run in zip(names, runs, strict=True)}
    save_figure(comparison_figure(history, CURVES), output / "curves.png")
    for ending, table in (("md", markdown_table), ("tex", latex_table), ("csv", csv_table)):
        (output / f"table.{ending}").write_text(table(rows))
    print(f"{markdown_table(rows)}\nWritten to {output}, with the curves.")


def read_price(text: str | None) -> float | None:
    """Return the price of an hour; None if there is none.

    Raises:
        InputError: It is no number of at least 0.
    """
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise InputError(f"price is '{text}', expected that of an hour, for example price=0.05.")
    return price


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 2 for bad input."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="or output=, columns=, price=")
    options = {"output": f"outputs/compare/{datetime.now():%Y-%m-%d_%H-%M-%S}"}
    paths = []
    for told in parser.parse_args(arguments).runs:
        name, _, value = told.partition("=")
        if name in ("output", "columns", "price"):
            options[name] = value
        else:
            paths.append(told)

    def work() -> None:
        columns = options["columns"].split(",") if "columns" in options else None
        compare(paths, Path(options["output"]), columns, read_price(options.get("price")))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
