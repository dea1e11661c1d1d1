"""Images of an experiment, and samples drawn from their features."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from featinv.cli.app import make_batches, sampler_options
from featinv.data import base
from featinv.evaluation.draws import Draws, draw
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8

FIRST_OF_EACH_CLASS = "the first image of each class, in the order of the data set"


def load_images(config: DictConfig, model: Inverter) -> dict:
    """Return all images of the config as one batch of a data module.

    Raises:
        InputError: There are none.
    """
    return join(make_batches(config, model))


def join(batches: Iterable[dict]) -> dict:
    """Return the batches of a data module as one.

    Raises:
        InputError: There are none.
    """
    batches = list(batches)
    if not batches:
        raise InputError("There is no image: the data set is empty.")
    columns = {name: [batch[name] for batch in batches] for name in batches[0]}
    return {
        name: torch.cat(parts) if isinstance(parts[0], Tensor) else list(chain(*parts))
        for name, parts in columns.items()
    }


def select(images: dict, rows: Tensor) -> dict:
    """Return some rows of a batch, by their numbers."""
    return {
        name: values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]
        for name, values in images.items()
    }


def first_of_each_class(batches: Iterable[dict], number: int) -> dict:
    """Return a batch of the first image of each class, for a figure; see `FIRST_OF_EACH_CLASS`.

    An image without a label counts as a class of its own.
    """
    at_least("num_pictures", number, 1)
    items = (
        {name: values[i] for name, values in batch.items()}
        for batch in batches
        for i in range(len(batch["label"]))
    )

    def label(item: dict) -> int | None:
        return int(item["label"]) if item["label"] >= 0 else None

    return default_collate(list(islice(base.first_of_each_class(items, label, 1), number)))


def in_chunks(
    images: dict, config: DictConfig, make: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Process images in chunks of about `batch_size` samples, and join the results.

    `make` takes the row numbers of a chunk, int64. Added is `photograph`, the number of the
    photograph that each image shows, for intervals (`harness.interval`).
    """
    size = max(1, config.batch_size // max(1, config.get("num_samples", 1)))
    chunks = torch.arange(len(images["index"])).split(size)
    with tqdm(chunks, unit="batch", desc="images", leave=False) as bar:
        parts = [make(chunk) for chunk in bar]
    return join(parts) | {"photograph": photograph_numbers(images)}


def photograph_numbers(images: dict) -> Tensor:
    """Return which photograph each image of a batch shows, int64, shape (N,)."""
    names = pd.Series(images.get("photograph", images["key"]))
    return torch.from_numpy(pd.factorize(names)[0])


def draw_samples(
    model: Inverter,
    condition: Tensor,
    indices: Sequence[int] | Tensor,
    config: DictConfig,
    num_samples: int | None = None,
) -> Draws:
    """Draw from features (B, C, h, w) with the config's seed, batch size, precision and sampler.

    The images' own numbers, `indices`, (B,), determine their noise.
    """
    number = config.num_samples if num_samples is None else num_samples
    options = {name: config[name] for name in ("seed", "batch_size", "precision")}
    options |= sampler_options(config)
    return draw(model, condition.to(model.device), indices, number, **options)


@torch.no_grad()
def reconstruct(model: Inverter, batch: dict, config: DictConfig) -> tuple[Tensor, Tensor]:
    """Draw one reconstruction of each image: the first of those that an evaluation scores.

    Returns reconstructions, uint8, (B, 3, H, W), and their spatial cosines, (B,).
    """
    features = model.backbone.features(from_uint8(batch["image"].to(model.device)))
    draws = draw_samples(model, features, batch["index"], config, num_samples=1)
    return draws.first(), draws.cosine(features)
