"""What experiments share: a grid of settings, each scored once, with a table and figures of it.

Two kinds of grid. In one, each setting is a model and how it draws, and is scored as evaluate.py
does it: `score_all`. In the other, each row is an edit of features or images, and
is measured image by image: `measure`, `interval_rows`. Both keep what is done below `output`, so
that the same command again goes on with what is missing.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from featinv.cli.app import command, log_table, make_batches, make_evaluation, sampler_options
from featinv.evaluation.draws import Draws, draw
from featinv.evaluation.kept import check_same, keep
from featinv.evaluation.tables import format_interval, save_numbers, save_tables
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8
from settings import (
    Setting,
    dependencies,
    open_model,
    reconstructs,
    refuse_prior,
)

log = logging.getLogger("harness")

FIRST_OF_EACH_CLASS = "the first image of each class, in the order of the data set"  # `pick`


def file_name(name: str) -> str:
    """Return the name of a row as one that a file can have."""
    return re.sub(r"[^\w.-]+", "_", name)


# Grids of models, scored as evaluate.py does it


def score_all(
    settings: Sequence[Setting], config: DictConfig, skip_priors: bool = False
) -> dict[str, dict]:
    """Return name -> contents of metrics.json, scored now or before.

    Args:
        settings: The grid.
        config: The experiment's.
        skip_priors: Leave out what does not reconstruct.

    Raises:
        InputError: There are scores of other weights, images or values, or a setting does not
            reconstruct.
    """
    results = {}
    with tqdm(settings, unit="setting", desc="score") as bar:
        for setting in bar:
            metrics = score(setting, config, Path(config.output) / file_name(setting.name))
            if metrics is not None:
                results[setting.name] = metrics
            elif not skip_priors:
                raise refuse_prior(setting.name)
    return results


def score(setting: Setting, config: DictConfig, folder: Path) -> dict | None:
    """Return the metrics of one setting; None if it does not reconstruct. See `score_all`."""
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
    check_same(path, metrics.get("depends_on", {}), wanted)
    return metrics


def scored_caption(metrics: dict) -> str:
    """Return what the numbers of a grid are, from the metrics of one of its settings."""
    sentences = [
        f"{metrics['num_images']} images, {metrics['num_samples']} sample(s) each, seed "
        f"{metrics['seed']}; on {metrics['device']} in {metrics['precision']}; mean over images "
        "with 95% bootstrap interval over photographs.",
    ]
    if "floor" in metrics["rows"]:
        sentences.append("Normalised is (cosine - floor) / (ceiling - floor).")
    for name in metrics["witnesses"][:1]:
        sentences.append(f"The witness {name} is a classifier that took no part.")
    return " ".join(sentences)


def check_one_layer(results: Mapping[str, dict]) -> None:
    """Refuse to compare the cosines of several backbones or layers.

    Args:
        results: Name -> contents of metrics.json, as `score_all` returns them.

    Raises:
        InputError: They are of several.
    """
    layers = {name: f"{m['backbone']} {m['layer']}" for name, m in results.items()}
    if len(set(layers.values())) > 1:
        raise InputError(
            f"Several layers are inverted ({layers}), whose cosines do not compare: expected one, "
            "with a prior, if there is one, of the same backbone (or prior=null)."
        )


# Grids of edits, measured image by image


def measure(
    rows: Mapping[str, Callable[[], dict[str, Tensor]]], wanted: Mapping, config: DictConfig
) -> dict[str, dict[str, Tensor]]:
    """Return name -> what was measured of a row, now or before.

    Args:
        rows: Name -> makes the row: one float for each image and value, and pictures in uint8, of
            which the first `num_pictures` are kept.
        wanted: What they depend on, from `dependencies`.
        config: `output` and, where there are pictures, `num_pictures`.
    """
    number = config.get("num_pictures", 0)

    def make(row: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: v[:number] if v.dtype == torch.uint8 else v for k, v in row().items()}

    folder = Path(config.output) / "rows"
    wanted = {**wanted, "num_pictures": number}
    with tqdm(rows.items(), unit="row", desc="measure") as bar:
        return {
            name: keep(folder / f"{file_name(name)}.safetensors", wanted, lambda row=row: make(row))
            for name, row in bar
        }


def in_chunks(
    number: int, config: DictConfig, make: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Join what is made of the images chunk by chunk, each of `batch_size` samples.

    Args:
        number: How many images there are.
        config: `batch_size`, and `num_samples` where there are several.
        make: Takes the numbers of a chunk's images.
    """
    size = max(1, config.batch_size // config.get("num_samples", 1))
    chunks = torch.arange(number).split(size)
    with tqdm(chunks, unit="batch", desc="images", leave=False) as bar:
        parts = [make(chunk) for chunk in bar]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def interval(values: Tensor, photographs: Sequence[str] | None = None) -> dict[str, float]:
    """Return mean and 95% bootstrap interval of one number for each image.

    Args:
        values: Shape (N,).
        photographs: Which photograph each image shows, to resample these.
    """
    low, high = bootstrap_interval(values, photographs=photographs)
    return {"mean": float(values.double().mean()), "low": low, "high": high}


def cell(values: Tensor, photographs: Sequence[str] | None = None, digits: int = 3) -> str:
    """Return mean and interval of one number for each image, as text. See `interval`."""
    return format_interval(**interval(values, photographs), digits=digits)


def interval_rows(
    results: Mapping[str, Mapping[str, Tensor]],
    columns: Mapping[str, str],
    head: str,
    photographs: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """Return a table of means with intervals, as text.

    Args:
        results: Row -> value -> one number for each image; a value may be missing.
        columns: Value -> title of its column.
        head: Title of the first column, the rows' names.
        photographs: As for `interval`; a row of other images resamples these.
    """

    def shown(values: Tensor) -> str:
        own = photographs is not None and len(photographs) == len(values)
        return cell(values, photographs if own else None)

    return [
        {head: name} | {title: shown(values[k]) for k, title in columns.items() if k in values}
        for name, values in results.items()
    ]


def measured_caption(number: int, config: DictConfig, how: str, what: str = "images") -> str:
    """Return what the numbers of a table of `interval_rows` are."""
    return (
        f"{number} {what}, {config.num_samples} sample(s) each, seed {config.seed}; {how}; mean "
        f"over {what} with 95% bootstrap interval."
    )


# Images and draws


def load_images(config: DictConfig, model: Inverter) -> dict:
    """Return all images of the config as one batch of a data module.

    Raises:
        InputError: There is none.
    """
    batches = list(make_batches(config, model))
    if not batches:
        raise InputError("There is no image: the data set is empty.")
    return {
        name: torch.cat(parts) if isinstance(parts[0], Tensor) else list(chain(*parts))
        for name, parts in ((name, [batch[name] for batch in batches]) for name in batches[0])
    }


def pick(batches: Iterable[dict], number: int) -> dict:
    """Return a batch of the images that a figure shows: the first of each class.

    Images without a label count as a class each.

    Args:
        batches: Of a data module.
        number: Of how many classes at most.
    """
    items: list[dict] = []
    classes = set()
    for batch in batches:
        for i, label in enumerate(batch["label"].tolist()):
            if label in classes:
                continue
            items.append({name: values[i] for name, values in batch.items()})
            if len(items) == number:
                return default_collate(items)
            if label >= 0:
                classes.add(label)
    return default_collate(items)


def draw_samples(
    model: Inverter,
    condition: Tensor,
    indices: Sequence[int] | Tensor,
    config: DictConfig,
    num_samples: int | None = None,
) -> Draws:
    """Draw as the config says: `seed`, `batch_size`, `precision`, `sampler`.

    Args:
        model: Draws.
        condition: Features to invert, shape (B, C, h, w).
        indices: Their own numbers, shape (B,).
        config: The experiment's.
        num_samples: Samples of each; `None`: `num_samples` of the config.
    """
    number = config.num_samples if num_samples is None else num_samples
    options = {name: config[name] for name in ("seed", "batch_size", "precision")}
    options |= sampler_options(config)
    return draw(model, condition.to(model.device), indices, number, **options)


@torch.no_grad()
def reconstruct(model: Inverter, batch: dict, config: DictConfig) -> tuple[Tensor, Tensor]:
    """Draw one reconstruction of each image: the first of those that an evaluation scores.

    Args:
        model: Whose own features are inverted and compared.
        batch: Of a data module.
        config: As for `draw_samples`.

    Returns:
        Reconstructions, uint8, (B, 3, H, W), and their spatial cosines, (B,).
    """
    features = model.backbone.features(from_uint8(batch["image"].to(model.device)))
    draws = draw_samples(model, features, batch["index"], config, num_samples=1)
    return draws.first(), draws.cosine(features)


# Tables


def publish(rows: Sequence[Mapping[str, str]], about: str, config: DictConfig) -> None:
    """Write an experiment's table down, print it, and log it where the config says.

    Args:
        rows: As for `featinv.evaluation.tables.markdown_table`.
        about: What the numbers are.
        config: `output`, where table.md, table.tex and table.csv go, and `wandb`.
    """
    text = save_tables(rows, f"{about}\n\nMade by `{command()}`.", config.output)
    print(f"\n{text}")
    log_table(rows, config)
    log.info("Everything is in %s", config.output)


def publish_measured(
    rows: Sequence[Mapping[str, str]], results: Mapping, about: str, config: DictConfig
) -> None:
    """Publish a table, and write the numbers behind it, as `measure` returns them, as JSON."""
    publish(rows, about, config)
    save_numbers(results, Path(config.output) / "results.json")
