"""What experiments share: a grid of rows, each measured once, with its table and figures.

There are two kinds of grid. A row of the first is a model with a sampler, scored like evaluate.py
does: `score_all`. A row of the second is an edit of features or images, measured image by image:
`measure`, `interval_rows`. Both keep finished rows below `output`, so that the same command
continues with those that are missing.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from featinv.cli.app import command, log_table, make_batches, make_evaluation
from featinv.evaluation.cache import check_settings, load_or_make
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.report import notes
from featinv.evaluation.tables import format_interval, save_numbers, save_tables
from featinv.metrics import bootstrap_interval
from featinv.utils.errors import InputError, at_least
from featinv.utils.files import write_text
from settings import Setting, dependencies, not_inverting, open_model, reconstructs

log = logging.getLogger("harness")

Results = Mapping[str, Mapping[str, Tensor]]  # row -> value -> one number for each image


def file_name(name: str) -> str:
    """Return a row's name as a valid file name."""
    return re.sub(r"[^\w.-]+", "_", name)


# Models, scored like evaluate.py does


def score_all(
    settings: Sequence[Setting], config: DictConfig, skip_priors: bool = False
) -> dict[str, dict]:
    """Score each setting, unless that is done already; return name -> contents of metrics.json.

    Args:
        settings: The grid.
        config: The experiment's.
        skip_priors: Leave out settings that do not invert features.

    Raises:
        InputError: The scores on disk are of other weights, images or values, or a setting does not
            invert features.
    """
    results = {}
    with tqdm(settings, unit="setting", desc="score") as bar:
        for setting in bar:
            metrics = score(setting, config, Path(config.output) / file_name(setting.name))
            if metrics is not None:
                results[setting.name] = metrics
            elif not skip_priors:
                raise not_inverting(setting.name)
    return results


def score(setting: Setting, config: DictConfig, folder: Path) -> dict | None:
    """Return the metrics of one setting; None if it does not invert features. See `score_all`."""
    config = setting.apply(config)
    path = folder / "metrics.json"
    wanted = dependencies(config, setting.checkpoint, "witnesses", "extractors", "lpips")
    if not path.is_file():
        model = open_model(setting.checkpoint, config)
        if not reconstructs(model, config):
            return None
        evaluation = make_evaluation(config, model)
        evaluation.run(make_batches(config, model), config.num_images)
        about = {"checkpoint": setting.checkpoint, "depends_on": wanted}
        evaluation.save(folder, command(), **about)
    metrics = json.loads(path.read_text())
    check_settings(path, metrics.get("depends_on", {}), wanted)
    return metrics


def scored_caption(metrics: dict) -> str:
    """Return a caption for the scores of a grid, from the metrics of one of its settings."""
    about = (
        f"{metrics['num_images']} images, {metrics['num_samples']} sample(s) each, seed "
        f"{metrics['seed']}; on {metrics['device']} in {metrics['precision']}; mean over images "
        "with 95% bootstrap interval over photographs."
    )
    return " ".join([about, *notes(metrics)])


def check_one_layer(results: Mapping[str, dict]) -> None:
    """Raise an `InputError` if the scores are of several backbones or layers.

    Args:
        results: From `score_all`.
    """
    layers = {name: f"{m['backbone']} {m['layer']}" for name, m in results.items()}
    if len(set(layers.values())) > 1:
        raise InputError(
            f"The models invert several layers ({layers}), whose cosines do not compare: expected "
            "models of one layer, with a prior of the same backbone (or prior=null)."
        )


# Edits, measured image by image


def measure(
    rows: Mapping[str, Callable[[], dict[str, Tensor]]], wanted: Mapping, config: DictConfig
) -> dict[str, dict[str, Tensor]]:
    """Measure each row, unless that is done already; return name -> measurements.

    Args:
        rows: Name -> function that measures the row: one float for each image and value, and
            pictures in uint8, of which the first `num_pictures` are kept.
        wanted: What the measurements depend on, from `dependencies`.
        config: `output` and, if there are pictures, `num_pictures`.
    """
    number = at_least("num_pictures", config.get("num_pictures", 1), 1)

    def make(row: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: v[:number] if v.dtype == torch.uint8 else v for k, v in row().items()}

    folder = Path(config.output) / "rows"
    wanted = {**wanted, "num_pictures": config.get("num_pictures", 0)}
    with tqdm(rows.items(), unit="row", desc="measure") as bar:
        return {
            name: load_or_make(
                folder / f"{file_name(name)}.safetensors", wanted, lambda row=row: make(row)
            )
            for name, row in bar
        }


def interval(values: Tensor, photographs: ArrayLike | None = None) -> dict[str, float]:
    """Return mean and 95% bootstrap interval of one number for each image.

    Args:
        values: Shape (N,).
        photographs: Which photograph each image shows: these are resampled.
    """
    low, high = bootstrap_interval(values, photographs=photographs)
    return {"mean": float(values.double().mean()), "low": low, "high": high}


def cell(values: Mapping[str, Tensor], key: str, digits: int = 3) -> str:
    """Return mean and interval of one of a row's values, as text; see `interval`."""
    return format_interval(**interval(values[key], values.get("photograph")), digits=digits)


def interval_rows(results: Results, columns: Mapping[str, str], head: str) -> list[dict[str, str]]:
    """Return a table of means with intervals, as text.

    Args:
        results: From `measure`; a row may lack a value.
        columns: Value -> title of its column.
        head: Title of the first column, which holds the rows' names.
    """
    return [
        {head: name} | {title: cell(values, k) for k, title in columns.items() if k in values}
        for name, values in results.items()
    ]


def measured_caption(number: int, config: DictConfig, how: str, what: str = "images") -> str:
    """Return a caption for a table of `interval_rows`."""
    return (
        f"{number} {what}, {config.num_samples} sample(s) each, seed {config.seed}; {how}; mean "
        f"over {what} with 95% bootstrap interval over photographs."
    )


# Tables and figures


class Column(NamedTuple):
    """A column of a figure.

    Args:
        title: Written above.
        pictures: From top to bottom, uint8, shape (3, H, W) each.
        captions: Written below the pictures, if any.
    """

    title: str
    pictures: Sequence[ArrayLike]
    captions: Sequence[str] = ()


def save_pictures(
    columns: Sequence[Column], path: str | Path, title: str = "", rows: Sequence[str] | None = None
) -> None:
    """Write a figure of pictures, as many rows as the shortest column has.

    Args:
        columns: From left to right.
        path: Of the figure.
        title: Written above.
        rows: Written at the left of each row.
    """
    number = min(len(column.pictures) for column in columns)
    pictures = [[column.pictures[i] for column in columns] for i in range(number)]
    captions = [[c.captions[i] if c.captions else "" for c in columns] for i in range(number)]
    titles = [column.title for column in columns]
    save_figure(gallery_figure(pictures, rows or (), titles, captions, title), path)


def beside_originals(originals: Tensor, drawn: Mapping[str, tuple[Tensor, Tensor]]) -> list[Column]:
    """Return the columns of a figure of originals and of reconstructions by several models.

    Args:
        originals: uint8, shape (N, 3, H, W).
        drawn: Name -> reconstructions, uint8, shape (N, 3, h, w), and their cosines, shape (N,).
    """
    columns = [
        Column(name, pictures, [f"cosine {cosine:.3f}" for cosine in cosines])
        for name, (pictures, cosines) in drawn.items()
    ]
    return [Column("original", originals), *columns]


def publish(
    rows: Sequence[Mapping[str, str]],
    about: str,
    config: DictConfig,
    results: Mapping | None = None,
    metrics: Mapping | None = None,
) -> None:
    """Write an experiment's table, print it, and log it if the config says wandb=true.

    Args:
        rows: As for `featinv.evaluation.tables.markdown_table`.
        about: The caption.
        config: `output`, the folder, and `wandb`.
        results: The measurements behind it, for results.json.
        metrics: Other numbers behind it, for metrics.json, which names the command too.
    """
    folder = Path(config.output)
    if results is not None:
        save_numbers(results, folder / "results.json")
    if metrics is not None:
        text = json.dumps({**metrics, "command": command()}, indent=2)
        write_text(folder / "metrics.json", f"{text}\n")
    text = save_tables(rows, f"{about}\n\nMade by `{command()}`.", folder)
    print(f"\n{text}")
    log_table(rows, config)
    log.info("Everything is in %s", folder)
