"""Invert an encoder that a model was not trained for, through a linear map fitted to a few images.

python experiments/adapt.py checkpoint=RUN backbone=dinov2_small data=imagenette data.root=PATH

The map takes the new encoder's features to those that RUN was trained with
(`featinv.analysis.adapt`). The table has a row for each number of images to fit it to: how well it
predicts RUN's features of held-out images, and how close the reconstructions come to the originals
in the new encoder. `trained=RUN2` adds a model that was trained for that encoder.
"""

import time
from functools import cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv.analysis.adapt import describe_layer, fit_adapter
from featinv.backbones import Backbone
from featinv.checkpoints import find_checkpoint
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import Draws, extract
from featinv.evaluation.pairing import other_images
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8
from settings import Setting, dependencies, file_hash, open_checkpoint, open_setting

COLUMNS = {
    "cosine": "cosine in the new encoder",
    "over_floor": "over the floor",
    "predicted": "cosine of the predicted features",
}


@torch.no_grad()
def read_pairs(model: Inverter, new: Backbone, config: DictConfig) -> tuple[Tensor, Tensor, float]:
    """Return both encoders' features of training images, new ones first, and seconds per image."""
    data = instantiate(config.data)
    num_batches = -(-max(config.num_fit_images) // data.batch_size)
    start, pairs = time.perf_counter(), []
    for batch in islice(data.train_dataloader(), num_batches):
        images = from_uint8(batch["image"].to(model.device))
        size = model.backbone.feature_shape[1:]
        maps = F.interpolate(new.features(images), size, mode="bilinear", antialias=True)
        pairs.append((maps.cpu(), model.backbone.features(images).cpu()))
    features, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return features, targets, (time.perf_counter() - start) / len(features)


def grid(model: Inverter, new: Backbone, images: dict, config: DictConfig) -> dict:
    """Return name -> function that measures a row: `COLUMNS`, and `drawn`, uint8."""
    features, targets = (
        extract(backbone, images["image"])[0] for backbone in (new, model.backbone)
    )
    floor = spatial_cosine(features, features[other_images(images["label"].tolist())])

    @torch.no_grad()
    def compare(draws: Draws, rows: Tensor) -> dict[str, Tensor]:
        drawn = new.features(draws.images).cpu()
        cosine = draws.mean(spatial_cosine(draws.repeat(features[rows]), drawn))
        return {"cosine": cosine, "over_floor": cosine - floor[rows], "drawn": draws.first()}

    pairs = cache(partial(read_pairs, model, new, config))  # not read if no row is missing

    def adapted(number: int) -> dict[str, Tensor]:
        x, y, seconds = pairs()
        start = time.perf_counter()
        backbone = fit_adapter(new, x[:number], y[:number])
        seconds = seconds * number + time.perf_counter() - start
        backbone.save(f"{config.output}/map_{number}.safetensors")

        @torch.no_grad()
        def draw(rows: Tensor) -> dict[str, Tensor]:
            condition = backbone.adapt(features[rows].to(model.device))
            draws = draw_samples(model, condition, images["index"][rows], config)
            predicted = spatial_cosine(condition.cpu(), targets[rows])
            return compare(draws, rows) | {"predicted": predicted}

        about = {"seconds": torch.tensor([seconds]), "strength": torch.tensor([backbone.strength])}
        return in_chunks(images, config, draw) | about

    def trained() -> dict[str, Tensor]:
        other, trained_config, _ = open_setting(Setting("trained", config.trained), config)
        if describe_layer(other.backbone) != describe_layer(new):
            raise InputError(
                f"'{config.trained}' inverts {describe_layer(other.backbone)}, expected a model "
                f"that was trained for {describe_layer(new)}."
            )

        def draw(rows: Tensor) -> dict[str, Tensor]:
            condition, indices = features[rows], images["index"][rows]
            return compare(draw_samples(other, condition, indices, trained_config), rows)

        return in_chunks(images, config, draw)

    rows = {f"{number} images": partial(adapted, number) for number in config.num_fit_images}
    rows |= {"a model trained for it": trained} if config.trained is not None else {}
    return rows | {"floor: another image": lambda: {"cosine": floor}}


def main(config: DictConfig) -> None:
    """Fit maps to few and more images, reconstruct with them, write table and figure."""
    model, sampling = open_checkpoint(config)
    new = instantiate(config.backbone).to(model.device)
    sizes = (model.image_size, model.backbone.image_size, new.image_size)
    config.data.image_size = config.data.image_size or max(sizes)
    images = load_images(config, model)
    depends_on = dependencies(config, config.checkpoint, "backbone")
    if config.trained is not None:
        depends_on["trained"] = file_hash(find_checkpoint(config.trained))
    results = harness.measure(grid(model, new, images, config), depends_on, config)
    rows = harness.interval_rows(results, COLUMNS, "fitted to")
    for row, values in zip(rows, results.values(), strict=True):
        if "seconds" in values:
            row["seconds"] = f"{float(values['seconds']):.1f}"
            row["ridge"] = f"{float(values['strength']):.0e}"
    columns = {name: (v["drawn"], v["cosine"]) for name, v in results.items() if "drawn" in v}
    title = f"{describe_layer(new)}, inverted by {config.checkpoint}"
    pictures = harness.beside_originals(images["image"], columns)
    harness.save_pictures(pictures, f"{config.output}/pictures.png", title, images["key"])
    about = harness.measured_caption(len(images["image"]), config, sampling)
    about += f" Encoder {describe_layer(new)}; the model inverts {describe_layer(model.backbone)}."
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "adapt")
