"""What a classifier does not care about: many samples from one feature map, and where they differ.

python experiments/invariances.py checkpoints=[RUN] data=imagenette data.root=PATH

Samples of an image should differ little in the features that they were made from, and may differ
much in pixels where the classifier does not look. Both spreads are given as shares of the spread
between different images, so that they can be compared.
"""

from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import interpolate

import harness
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import see
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure
from featinv.metrics import calibration_ratio, pixel_spread, sample_distances
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import Setting, dependencies, find_models, open_setting

COLUMNS = {
    "pixels": "spread in pixels, of that between images",
    "features": "spread in features, of that between images",
    "ratio": "pixels / features",
}


def spread(samples: Tensor) -> Tensor:
    """Return the root mean square distance of samples (B, S, ...) to their mean, shape (B,)."""
    return samples.float().flatten(2).var(dim=1, correction=1).sum(dim=1).sqrt()


@torch.no_grad()
def spreads(setting: Setting, config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image and measure how they differ.

    Returns:
        `pixels` and `features`: spread over an image's samples as a share of the spread over
        images, each (N,); `ratio`, the one by the other; `channels`: root mean square deviation of
        a channel as a share of its root mean square, (C,); `calibration`, the ratio of each image,
        (N,). For figures, in uint8: `original`
        (N, 3, H, W), the first `drawn` (N, 3, 3, H, W), their `mean`, and where pixels `vary` and
        features are `kept`, (N, 3, H, W) each.
    """
    model, own, _ = open_setting(setting, config)
    images = harness.load_images(own, model)

    def rows(chunk: Tensor) -> dict[str, Tensor]:
        features, _ = see(model.backbone, images["image"][chunk])
        draws = harness.draw_samples(model, features, images["index"][chunk], own)
        shape = (len(chunk), own.num_samples)
        return {
            "samples": draws.images.unflatten(0, shape).cpu(),
            "seen": draws.features.unflatten(0, shape).cpu(),
        }

    found = harness.in_chunks(len(images["image"]), own, rows)
    samples, seen = found["samples"], found["seen"].float()
    # Different images: the samples' own first ones, so that both are of the same kind.
    pixels, features = (spread(x) / spread(x[None, :, 0]) for x in (samples, seen))
    deviation, power = seen.var(dim=1, correction=1), seen.square().mean(dim=1)  # (N, C, h, w)

    def share(dims: int | tuple[int, ...]) -> Tensor:
        return (deviation.sum(dims) / power.sum(dims).clamp(min=1e-12)).sqrt()

    original = to_uint8(resize(from_uint8(images["image"]), model.image_size))
    between, to_original = sample_distances(samples, from_uint8(original))
    mean, vary = to_uint8(samples.mean(dim=1)), pixel_spread(samples)
    kept = interpolate(1 - share(1)[:, None], original.shape[-2:])[:, 0]
    return {
        "pixels": pixels,
        "features": features,
        "ratio": pixels / features,
        "channels": share((0, 2, 3)),
        "calibration": torch.from_numpy(calibration_ratio(between, to_original)),
        "original": original,
        "drawn": to_uint8(samples[:, :3]),
        "mean": mean,
        "vary": lit(mean, vary, vary.amax(dim=(1, 2))),
        "kept": lit(original, kept, torch.ones(len(kept))),
    }


def lit(pictures: Tensor, maps: Tensor, largest: Tensor) -> Tensor:
    """Lay a map over each picture, see `heat_over`."""
    each = zip(pictures, maps, largest.tolist(), strict=True)
    return torch.stack([torch.from_numpy(heat_over(*values)) for values in each])


def invariances_figure(results: dict[str, dict[str, Tensor]]) -> Figure:
    """Draw originals, samples, their mean, and where pixels and features vary."""
    pictures, rows, captions = [], [], []
    for i in range(min(len(values["drawn"]) for values in results.values())):
        for name, values in results.items():
            original, mean, vary, kept = (
                values[key][i] for key in ("original", "mean", "vary", "kept")
            )
            pictures.append([original, *values["drawn"][i], mean, vary, kept])
            rows.append(name)
            before = [""] * (len(pictures[-1]) - 2)
            captions.append([*before, f"calibration {float(values['calibration'][i]):.2f}"])
    samples = [f"sample {s + 1}" for s in range(len(values["drawn"][0]))]
    columns = ["original", *samples, "mean", "where pixels vary", "where features are kept"]
    return gallery_figure(pictures, rows, columns, captions)


def main(config: DictConfig) -> None:
    """Measure every model, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    results: dict[str, dict[str, Tensor]] = {}
    if config.num_images == 1:
        raise InputError("A spread between images takes two, got one: expected num_images=2.")
    for name, checkpoint in find_models(config.checkpoints).items():
        row = partial(spreads, Setting(name, checkpoint), config)
        results |= harness.measure({name: row}, dependencies(config, checkpoint), config)
    output = Path(config.output)
    save_figure(invariances_figure(results), output / "invariances.png")
    rows = harness.interval_rows(results, COLUMNS, "model")
    for row, values in zip(rows, results.values(), strict=True):
        least, most = values["channels"].quantile(torch.tensor([0.05, 0.95])).tolist()
        row["channels that vary least / most"] = f"{least:.3f} / {most:.3f}"
    number = len(next(iter(results.values()))["pixels"])
    about = harness.measured_caption(number, config, "as each model draws")
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "invariances")
