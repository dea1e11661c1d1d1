"""What a classifier does not care about: many samples from one feature map, and where they differ.

python experiments/invariances.py checkpoints=[RUN] data=imagenette data.root=PATH

Samples of an image should differ little in the features that they were made from, and may differ
much in pixels where the classifier does not look. Both spreads are given as shares of the spread
between different images, so that they can be compared.
"""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from experiments.harness import draw, find_models, publish
from featinv import FeatInv
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval, pixel_spread
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8

log = logging.getLogger("invariances")


def spread(samples: Tensor) -> Tensor:
    """Return the root mean square distance of samples (B, S, ...) to their mean, shape (B,)."""
    samples = samples.float().flatten(2)
    variance = samples.var(dim=1, correction=1)  # (B, D)
    return variance.sum(dim=1).sqrt()


@torch.no_grad()
def measure(model: Inverter, batches: list[dict], config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image and measure how they differ.

    Returns:
        `pixels` and `features`: spread over an image's samples as a share of the spread over
        images, each (N,); `ratio`, the one by the other; `where`: feature spread by position as a
        share of the features' length there, (N, h, w); `channels`: the share by channel, (C,);
        `drawn` uint8, (N, S, 3, H, W); `pixel_map`, (N, H, W).
    """
    originals, drawn, seen = [], [], []
    for batch in tqdm(batches, unit="batch", desc="samples", leave=False):
        images = from_uint8(batch["image"].to(model.device))
        samples = draw(model, model.backbone.features(images), batch["index"], config)
        features = torch.cat([model.backbone.features(x) for x in samples.flatten(0, 1).split(32)])
        seen.append(features.unflatten(0, samples.shape[:2]).cpu())
        drawn.append(samples.cpu())
        originals.append(resize(images, model.image_size).cpu())
    samples, features = torch.cat(drawn), torch.cat(seen)
    # Different images: the samples' own first ones, so that both are of the same kind.
    between_pixels, between_features = (spread(x[None, :, 0]) for x in (samples, features))
    pixels = spread(samples) / between_pixels
    inner = spread(features) / between_features
    deviation = features.var(dim=1, correction=1)  # (N, C, h, w)
    power = features.square().mean(dim=1)
    return {
        "pixels": pixels,
        "features": inner,
        "ratio": pixels / inner,
        "where": (deviation.sum(dim=1) / power.sum(dim=1).clamp(min=1e-12)).sqrt(),
        "channels": (deviation.sum((0, 2, 3)) / power.sum((0, 2, 3)).clamp(min=1e-12)).sqrt(),
        "drawn": to_uint8(samples),
        "pixel_map": pixel_spread(samples),
        "original": to_uint8(torch.cat(originals)),
    }


def table_rows(results: dict[str, dict[str, Tensor]]) -> list[dict[str, str]]:
    """Return the table, as text."""
    titles = {
        "pixels": "spread in pixels, of that between images",
        "features": "spread in features, of that between images",
        "ratio": "pixels / features",
    }
    rows = []
    for name, values in results.items():
        cells = {
            title: format_interval(float(values[k].mean()), *bootstrap_interval(values[k]))
            for k, title in titles.items()
        }
        share = values["channels"]
        cells["channels that vary least / most"] = (
            f"{float(share.quantile(0.05)):.3f} / {float(share.quantile(0.95)):.3f}"
        )
        rows.append({"model": name} | cells)
    return rows


def figure(results: dict[str, dict[str, Tensor]], number: int):
    """Draw originals, samples, their mean, and where pixels and features vary."""
    pictures, rows = [], []
    for i in range(number):
        for name, values in results.items():
            drawn, original = values["drawn"][i], values["original"][i]
            side = drawn.shape[-1]
            mean = drawn.float().mean(0).round().byte()
            vary = heat_over(mean, values["pixel_map"][i], float(values["pixel_map"][i].max()))
            where = interpolate(values["where"][i][None, None], (side, side))[0, 0]
            kept = heat_over(original, 1 - where, 1.0)
            pictures.append([original, *drawn[:3], mean, vary, kept])
            rows.append(name)
    shown = min(3, len(drawn))
    columns = ["original", *(f"sample {s + 1}" for s in range(shown)), "mean"]
    columns += ["where pixels vary", "where features are kept"]
    return gallery_figure(pictures, rows, columns)


def main(config: DictConfig) -> None:
    """Measure every model, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    models = find_models(config.checkpoints)
    results: dict[str, dict[str, Tensor]] = {}
    for name, checkpoint in tqdm(models.items(), unit="model", desc="invariances"):
        model = FeatInv.load(checkpoint).to(pick_device(config.device))
        batches = list(make_batches(config, model))
        if sum(len(batch["index"]) for batch in batches) < 2:
            raise InputError("A spread between images takes two, got one: expected num_images=2.")
        results[name] = measure(model, batches, config)
    output = Path(config.output)
    number = min(config.num_pictures, *(len(values["drawn"]) for values in results.values()))
    save_figure(figure(results, number), output / "invariances.png")
    rows = table_rows(results)
    about = (
        f"{len(next(iter(results.values()))['drawn'])} images, {config.num_samples} samples each, "
        f"seed {config.seed}; mean over images with 95% bootstrap interval."
    )
    publish(rows, about, config)
    numbers = {
        name: {k: values[k] for k in ("pixels", "features", "ratio", "channels")}
        for name, values in results.items()
    }
    save_numbers(numbers, output / "results.json")


if __name__ == "__main__":
    run_entry_point(main, "invariances")
