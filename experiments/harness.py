"""What experiments share: a grid of rows, each measured once, with its table and figures.

There are two kinds of grid. A row of the first is a model with a sampler, scored as by evaluate.py:
`score_all`. A row of the second is an edit of features or images, measured image by image:
`measure`, `interval_rows`. Both keep finished rows below `output`, so that the same command
continues with those that are missing.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_plus

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
from settings import NotInverting, Setting, dependencies, open_setting

log = logging.getLogger("harness")

Results = Mapping[str, Mapping[str, Tensor]]  # row -> value -> one number for each image


def file_name(name: str) -> str:
    """Return a row's name as a valid file name, different for every name."""
    return quote_plus(name)


# Models, scored as by evaluate.py


def score_all(
    settings: Sequence[Setting], config: DictConfig, skip_priors: bool = False
) -> dict[str, dict]:
    """Score each setting, unless that is done already; return name -> contents of metrics.json.

    Raises:
        InputError: The scores on disk are of other weights, images or values.
        NotInverting: A setting does not invert features, unless they are to be skipped.
    """
    results = {}
    with tqdm(settings, unit="setting", desc="score") as bar:
        for setting in bar:
            try:
                folder = Path(config.output) / file_name(setting.name)
                results[setting.name] = score(setting, config, folder)
            except NotInverting:
                if not skip_priors:
                    raise
    return results


def score(setting: Setting, config: DictConfig, folder: Path) -> dict:
    """Return the metrics of one setting; see `score_all`."""
    config = setting.apply(config)
    path = folder / "metrics.json"
    wanted = dependencies(config, setting.checkpoint, "witnesses", "extractors", "lpips")
    if not path.is_file():
        model, _, _ = open_setting(setting, config)
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


def layers_caption(results: Mapping[str, dict]) -> str:
    """Return a sentence about the layers that the scores of `score_all` are of."""
    layers = dict.fromkeys(f"{m['backbone']}, layer {m['layer']}" for m in results.values())
    several = " Cosines of different layers do not compare." if len(layers) > 1 else ""
    return f"Backbone {'; '.join(layers)}.{several}"


# Edits, measured image by image


def measure(
    rows: Mapping[str, Callable[[], dict[str, Tensor]]], wanted: Mapping, config: DictConfig
) -> dict[str, dict[str, Tensor]]:
    """Measure each row, unless that is done already; return name -> measurements.

    A row's function returns one float for each image and value, and pictures in uint8, of which the
    first `num_pictures` are kept. The measurements depend on what is `wanted`, see `dependencies`.
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


def count(name: str, share: float, total: int) -> int:
    """Return a share of a number of things, at least one; `name` is that of the config's value."""
    if not 0 < share <= 1:
        raise InputError(f"{name} is {share}, expected a share above 0 and up to 1, or null.")
    return max(1, round(share * total))


def interval(values: Tensor, photographs: ArrayLike | None = None) -> dict[str, float]:
    """Return mean and 95% bootstrap interval of one number for each image, shape (N,).

    What is resampled is the photographs that the images show, if they are given.
    """
    low, high = bootstrap_interval(values, photographs=photographs)
    return {"mean": float(values.double().mean()), "low": low, "high": high}


def cell(values: Mapping[str, Tensor], key: str, digits: int = 3) -> str:
    """Return mean and interval of one of a row's values, as text; see `interval`."""
    return format_interval(**interval(values[key], values.get("photograph")), digits=digits)


def interval_rows(results: Results, columns: Mapping[str, str], head: str) -> list[dict[str, str]]:
    """Return a table of means with intervals, as text.

    `columns` is value -> title; a row may lack a value. `head` is the title of the rows' names.
    """
    return [
        {head: name} | {title: cell(values, k) for k, title in columns.items() if k in values}
        for name, values in results.items()
    ]


def measured_caption(number: int, config: DictConfig, sampling: str, what: str = "images") -> str:
    """Return a caption for a table of `interval_rows`."""
    return (
        f"{number} {what}, {config.num_samples} sample(s) each, seed {config.seed}; {sampling}; "
        f"mean over {what} with 95% bootstrap interval over photographs."
    )


# Tables and figures


class Column(NamedTuple):
    """A column of a figure."""

    title: str
    pictures: Sequence[ArrayLike]  # uint8, shape (3, H, W) each
    captions: Sequence[str] = ()  # below the pictures


def save_pictures(
    columns: Sequence[Column], path: str | Path, title: str = "", rows: Sequence[str] | None = None
) -> None:
    """Write a figure of as many rows as the shortest column has; `rows` are their titles."""
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
    """Write an experiment's table and caption, print them, log them if the config says wandb=true.

    The measurements behind it go to results.json, other numbers to metrics.json.
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
