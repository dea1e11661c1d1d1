"""What a classifier ignores: many samples of one feature map, and where they differ.

python experiments/invariances.py checkpoints=[RUN] data=imagenette data.root=PATH

Samples of an image should differ little in the features that they were drawn from, and may differ
much in pixels that the classifier ignores. To compare the two, both spreads are given as shares of
the spread between different images.
"""

from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import interpolate

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import extract
from featinv.evaluation.figures import highlight
from featinv.metrics import calibration_ratio, pixel_spread, sample_distances
from featinv.utils.errors import at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from harness import Column
from settings import Setting, dependencies, each_layer, find_settings, open_setting

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
        `pixels` and `features`, the spread over an image's samples as a share of the spread over
        images, and `ratio`, the one by the other, each (N,); `calibration`, the ratio of each
        image, (N,); `channels`, the root mean square deviation of a channel as a share of its root
        mean square, (C,). For the figure, in uint8: `original` (N, 3, H, W), the first samples
        `drawn` (N, 3, 3, H, W), their `mean`, where pixels `vary` and where features are `kept`,
        (N, 3, H, W) each.
    """
    model, model_config, _ = open_setting(setting, config)
    images = load_images(model_config, model)

    def draw(rows: Tensor) -> dict[str, Tensor]:
        features, _ = extract(model.backbone, images["image"][rows])
        draws = draw_samples(model, features, images["index"][rows], model_config)
        found = {"samples": draws.images, "seen": draws.features.float()}
        return {name: values.unflatten(0, (len(rows), -1)).cpu() for name, values in found.items()}

    found = in_chunks(images, model_config, draw)
    samples, seen = found["samples"], found["seen"]
    # Different images are represented by their first samples, so that both spreads are of samples.
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
        "photograph": found["photograph"],
        "original": original,
        "drawn": to_uint8(samples[:, :3]),
        "mean": mean,
        "vary": lit(mean, vary, vary.amax(dim=(1, 2))),
        "kept": lit(original, kept, torch.ones(len(kept))),
    }


def lit(pictures: Tensor, maps: Tensor, largest: Tensor) -> Tensor:
    """Lay a map over each picture, see `highlight`."""
    each = zip(pictures, maps, largest.tolist(), strict=True)
    return torch.stack([torch.from_numpy(highlight(*values)) for values in each])


def save_figure(results: harness.Results, config: DictConfig) -> None:
    """Draw originals, samples, their mean, and where pixels and features vary."""
    number = min(len(values["drawn"]) for values in results.values())

    def column(title: str, key: str, *index: int) -> Column:
        rows = [(values, i) for i in range(number) for values in results.values()]
        pictures = [values[key][(i, *index)] for values, i in rows]
        captions = [f"calibration {float(values['calibration'][i]):.2f}" for values, i in rows]
        return Column(title, pictures, captions if key == "kept" else ())

    samples = range(min(3, config.num_samples))
    columns = [
        column("original", "original"),
        *(column(f"sample {s + 1}", "drawn", s) for s in samples),
        column("mean", "mean"),
        column("where pixels vary", "vary"),
        column("where features are kept", "kept"),
    ]
    harness.save_pictures(columns, f"{config.output}/invariances.png", rows=[*results] * number)


def main(config: DictConfig) -> None:
    """Measure every model, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    if config.num_images is not None:
        at_least("num_images", config.num_images, 2)  # whose spread is compared
    results: dict[str, dict[str, Tensor]] = {}
    for setting in each_layer(find_settings(config), config.layer):
        row = {setting.name: partial(spreads, setting, config)}
        wanted = dependencies(setting.apply(config), setting.checkpoint)
        results |= harness.measure(row, wanted, config)
    save_figure(results, config)
    rows = harness.interval_rows(results, COLUMNS, "model")
    for row, values in zip(rows, results.values(), strict=True):
        least, most = values["channels"].quantile(torch.tensor([0.05, 0.95])).tolist()
        row["channels that vary least / most"] = f"{least:.3f} / {most:.3f}"
    number = len(next(iter(results.values()))["pixels"])
    about = harness.measured_caption(number, config, "as each model draws")
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "invariances")
