"""What lies between two images in feature space: interpolations, splices and swaps, inverted.

python experiments/mixtures.py checkpoint=RUN data=imagenette data.root=PATH

The same noise for all mixtures of a pair. Beside each stands the baseline of mixing the pixels
first and inverting the features of that.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from experiments.harness import draw, publish
from featinv import FeatInv
from featinv.analysis.edits import PATHS, half, mix, splice, swap_channels
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval, spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import from_uint8, to_uint8
from featinv.utils.seeding import make_generator

log = logging.getLogger("mixtures")

Mixer = Callable[[Tensor, Tensor], Tensor]  # two images or feature maps -> one


def mixtures(config: DictConfig, num_channels: int) -> dict[str, tuple[Mixer, Mixer | None]]:
    """Return name -> how features are mixed, and how pixels are, where that means anything.

    Raises:
        InputError: Unknown path or half, or a share out of range.
    """
    made: dict[str, tuple[Mixer, Mixer | None]] = {}
    for path in config.paths:
        if path not in PATHS:
            raise unknown("path of a mixture", path, PATHS)
        for weight in config.weights:
            made[f"{path} {weight:g}"] = (
                lambda a, b, w=weight, p=path: mix(a, b, w, p),
                lambda a, b, w=weight: mix(a, b, w),
            )
    for side in config.halves:
        half((2, 2), side)  # refuses what there is not

        def take(a: Tensor, b: Tensor, side: str = side) -> Tensor:
            return splice(a, b, half(a.shape[2:], side).to(a.device))

        made[f"{side} half"] = (take, take)
    if config.channels is not None:
        if not 0 < config.channels < 1:
            raise InputError(
                f"channels is {config.channels}, expected a share above 0 and below 1, for example "
                "0.5, or null."
            )
        order = torch.randperm(num_channels, generator=make_generator(config.seed)).tolist()
        chosen = order[: max(1, round(config.channels * num_channels))]
        made[f"{len(chosen)} channels"] = (lambda a, b: swap_channels(a, b, chosen), None)
    return made


@torch.no_grad()
def measure(
    model: Inverter, asked: Tensor, target: Tensor, classes: tuple, config: DictConfig
) -> dict[str, Tensor]:
    """Invert features and measure what comes out.

    Args:
        model: Draws.
        asked: Features to invert, shape (B, C, h, w).
        target: The mixture that the cosine is to, same shape.
        classes: What the backbone says of the first and of the second images, each (B,).
        config: `num_samples`, `seed`, `batch_size`, `sampler`.

    Returns:
        `drawn` (uint8, (B, 3, H, W), the first samples); `cosine`, and the probabilities `first`
        and `second` of the two images' classes, each of shape (B,).
    """
    drawn = draw(model, asked, torch.arange(len(asked)), config)
    seen, logits = model.backbone.features_and_logits(drawn.flatten(0, 1))
    probabilities = logits.softmax(1)

    def mean(values: Tensor) -> Tensor:
        return values.view(-1, config.num_samples).mean(1).cpu()

    def of(labels: Tensor) -> Tensor:
        repeated = labels.repeat_interleave(config.num_samples)
        return mean(probabilities.gather(1, repeated[:, None])[:, 0])

    repeated = target.repeat_interleave(config.num_samples, 0)
    return {
        "drawn": to_uint8(drawn[:, 0]).cpu(),
        "cosine": mean(spatial_cosine(repeated, seen)),
        "first": of(classes[0]),
        "second": of(classes[1]),
    }


def table_rows(results: dict[str, dict[str, dict[str, Tensor]]]) -> list[dict[str, str]]:
    """Return the table, as text."""
    titles = {
        "cosine": "spatial cosine to the mixture",
        "first": "probability of the first's class",
        "second": "probability of the second's class",
    }
    rows = []
    for name, ways in results.items():
        for way, values in ways.items():
            cells = {
                title: format_interval(float(values[k].mean()), *bootstrap_interval(values[k]))
                for k, title in titles.items()
            }
            rows.append({"mixture": name, "mixed in": way} | cells)
    return rows


def strips(a: Tensor, b: Tensor, results: dict, names: list[str], title: str):
    """Draw, for each pair, the first image, the mixtures in features and in pixels, the second."""
    pictures, captions, rows = [], [], []
    for i in range(len(a)):
        for way in ("features", "pixels"):
            found = [results[name].get(way) for name in names]
            if all(values is None for values in found):
                continue
            blank = torch.full_like(results[names[0]]["features"]["drawn"][i], 255)
            drawn = [blank if v is None else v["drawn"][i] for v in found]
            pictures.append([a[i], *drawn, b[i]])
            cosines = ["" if v is None else f"cosine {v['cosine'][i]:.2f}" for v in found]
            captions.append(["", *cosines, ""])
            rows.append(way)
    columns = ["first", *names, "second"]
    return gallery_figure(pictures, rows, columns, captions, title)


def main(config: DictConfig) -> None:
    """Mix every pair in every way, write table and strips."""
    model = FeatInv.load(config.checkpoint).to(pick_device(config.device))
    backbone = model.backbone
    made = mixtures(config, backbone.feature_shape[0])
    images = torch.cat([batch["image"] for batch in make_batches(config, model)])
    if len(images) < 2:
        raise InputError("A mixture takes two images, got one: expected num_images=2 or more.")
    others = images.roll(-1, 0)
    first, second = (from_uint8(x.to(model.device)) for x in (images, others))
    with torch.no_grad():
        parts = [
            torch.cat(part)
            for part in zip(
                *(backbone.features_and_logits(x) for x in first.split(32)), strict=True
            )
        ]
    features, classes = parts[0], parts[1].argmax(1)
    pair = (features, features.roll(-1, 0))
    labels = (classes, classes.roll(-1, 0))
    results: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, (in_features, in_pixels) in tqdm(made.items(), unit="mixture", desc="mixtures"):
        target = in_features(*pair)
        results[name] = {"features": measure(model, target, target, labels, config)}
        if in_pixels is not None:
            with torch.no_grad():
                mixed = in_pixels(first, second).clamp(-1, 1)
                seen = torch.cat([backbone.features(x) for x in mixed.split(32)])
            results[name]["pixels"] = measure(model, seen, target, labels, config)
    output = Path(config.output)
    number = min(config.num_pictures, len(images))
    small = [
        interpolate(x[:number].float(), (128, 128), mode="area").byte() for x in (images, others)
    ]
    title = f"mixtures of the features of {backbone.name}, layer {backbone.layer}; same noise"
    for path in config.paths:
        names = [name for name in made if name.startswith(path)]
        save_figure(strips(*small, results, names, f"{path} {title}"), output / f"{path}.png")
    if names := [name for name in made if not name.startswith(tuple(config.paths))]:
        save_figure(strips(*small, results, names, title), output / "splices.png")
    rows = table_rows(results)
    how = model.settings(**sampler_options(config)).describe()
    about = (
        f"{len(images)} pairs, {config.num_samples} sample(s) each, seed {config.seed}; "
        f"{how}; mean over pairs with 95% bootstrap interval."
    )
    publish(rows, about, config)
    save_numbers(results, output / "results.json")


if __name__ == "__main__":
    run_entry_point(main, "mixtures")
