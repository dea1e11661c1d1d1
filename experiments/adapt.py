"""Invert an encoder that a model was not trained for: a linear map, fitted to a few hundred images.

python experiments/adapt.py checkpoint=RUN backbone=dinov2_small data=imagenette data.root=PATH

The map goes from the new encoder's features to those that RUN was trained with, see
`featinv.analysis.adapt`. The table has a row for each number of images that it is fitted to: how
well it predicts RUN's features of held-out images, and how near the reconstructions come to the
originals, seen by the new encoder. `trained=RUN2` adds a model that was trained for that encoder.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv.analysis.adapt import describe_layer, fit_adapter, resize_maps
from featinv.analysis.calibration import other_images
from featinv.backbones import Backbone
from featinv.checkpoints import find_checkpoint
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import Draws, see
from featinv.evaluation.figures import columns_figure, save_figure
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8
from settings import Setting, dependencies, file_hash, open_setting

COLUMNS = {
    "cosine": "cosine in the new encoder",
    "over_floor": "over the floor",
    "predicted": "cosine of the predicted features",
}


@torch.no_grad()
def read_pairs(model: Inverter, new: Backbone, config: DictConfig) -> tuple[Tensor, Tensor, float]:
    """Return the new encoder's features of training images, the model's, and seconds per image."""
    number = max(config.num_fit_images)
    data = instantiate(config.data)
    start, features, targets = time.perf_counter(), [], []
    for batch in islice(data.train_dataloader(), -(-number // data.batch_size)):
        images = from_uint8(batch["image"].to(model.device))
        maps = resize_maps(new.features(images), model.backbone.feature_shape[1:])
        features.append(maps.cpu())
        targets.append(model.backbone.features(images).cpu())
    features, targets = torch.cat(features), torch.cat(targets)
    return features, targets, (time.perf_counter() - start) / len(features)


def grid(
    model: Inverter, new: Backbone, images: dict, config: DictConfig
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return name -> what measures a row of the table, see `COLUMNS`; and `drawn`, uint8."""
    features, _ = see(new, images["image"])
    targets, _ = see(model.backbone, images["image"])
    others = features[other_images(images["label"].tolist())]
    floor = spatial_cosine(features, others)  # of another class
    fitted: list[tuple[Tensor, Tensor, float]] = []  # read once, and only if a row is missing

    @torch.no_grad()
    def measure(draws: Draws, chunk: Tensor) -> dict[str, Tensor]:
        seen = new.features(draws.images).cpu()
        cosine = draws.mean(spatial_cosine(draws.repeat(features[chunk]), seen))
        return {"cosine": cosine, "over_floor": cosine - floor[chunk], "drawn": draws.first()}

    def adapted(number: int) -> dict[str, Tensor]:
        fitted.extend([] if fitted else [read_pairs(model, new, config)])
        x, y, seconds = fitted[0]
        start = time.perf_counter()
        backbone = fit_adapter(new, x[:number], y[:number])
        seconds = seconds * number + time.perf_counter() - start
        backbone.save(Path(config.output) / f"map_{number}.safetensors")

        @torch.no_grad()
        def rows(chunk: Tensor) -> dict[str, Tensor]:
            condition = backbone.adapt(features[chunk].to(model.device))
            draws = harness.draw_samples(model, condition, images["index"][chunk], config)
            predicted = spatial_cosine(condition.cpu(), targets[chunk])
            return measure(draws, chunk) | {"predicted": predicted}

        about = {"seconds": torch.tensor([seconds]), "strength": torch.tensor([backbone.strength])}
        return harness.in_chunks(len(features), config, rows) | about

    def trained() -> dict[str, Tensor]:
        other, own, _ = open_setting(Setting("trained", config.trained), config)
        if describe_layer(other.backbone) != describe_layer(new):
            raise InputError(
                f"'{config.trained}' inverts {describe_layer(other.backbone)}, expected a model "
                f"that was trained for {describe_layer(new)}."
            )

        def rows(chunk: Tensor) -> dict[str, Tensor]:
            draws = harness.draw_samples(other, features[chunk], images["index"][chunk], own)
            return measure(draws, chunk)

        return harness.in_chunks(len(features), config, rows)

    found = {f"{number} images": partial(adapted, number) for number in config.num_fit_images}
    found |= {"a model trained for it": trained} if config.trained is not None else {}
    return found | {"floor: another image": lambda: {"cosine": floor}}


def main(config: DictConfig) -> None:
    """Fit with few and more images, draw, write the table and a figure."""
    for number in config.num_fit_images:
        at_least("num_fit_images", number, 2)
    model, config, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    new = instantiate(config.backbone).to(model.device)
    sizes = (model.image_size, model.backbone.image_size, new.image_size)
    config.data.image_size = config.data.image_size or max(sizes)
    images = harness.load_images(config, model)
    depends_on = dependencies(config, config.checkpoint, "backbone")
    if config.trained is not None:
        depends_on["trained"] = file_hash(find_checkpoint(config.trained))
    results = harness.measure(grid(model, new, images, config), depends_on, config)
    rows = harness.interval_rows(results, COLUMNS, "fitted to")
    for row, values in zip(rows, results.values(), strict=True):
        if "seconds" in values:
            row["seconds"] = f"{float(values['seconds']):.1f}"
            row["ridge"] = f"{float(values['strength']):.0e}"
    drawn = {name: values["drawn"] for name, values in results.items() if "drawn" in values}
    title = f"{describe_layer(new)}, inverted by {config.checkpoint}"
    shown = [images[name][: config.num_pictures] for name in ("image", "key")]
    columns = {name: (pictures, results[name]["cosine"]) for name, pictures in drawn.items()}
    save_figure(columns_figure(*shown, columns, title), Path(config.output) / "pictures.png")
    about = harness.measured_caption(len(images["image"]), config, sampling)
    about += f" Encoder {describe_layer(new)}; the model inverts {describe_layer(model.backbone)}."
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "adapt")
