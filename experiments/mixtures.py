"""What lies between two images in feature space: interpolations, splices and swaps, inverted.

python experiments/mixtures.py checkpoint=RUN data=imagenette data.root=PATH

The same noise for all mixtures of a pair. Beside each stands the baseline of mixing the pixels
first and inverting the features of that.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv.analysis.edits import PATHS, half, mix, splice, swap_channels
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import see
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.models.base import Inverter
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import from_uint8, to_uint8
from featinv.utils.seeding import make_generator
from settings import Setting, dependencies, open_setting

Mixer = Callable[[Tensor, Tensor], Tensor]  # two images or feature maps -> one

COLUMNS = {
    "cosine": "spatial cosine to the mixture",
    "first": "probability of the first's class",
    "second": "probability of the second's class",
}


def mixers(config: DictConfig, num_channels: int) -> dict[str, tuple[Mixer, Mixer | None]]:
    """Return name -> how features are mixed, and how pixels are, where that means anything.

    Raises:
        InputError: Unknown path or half, or a share out of range.
    """
    made: dict[str, tuple[Mixer, Mixer | None]] = {}
    for path in config.paths:
        if path not in PATHS:
            raise unknown("path of a mixture", path, PATHS)
        for weight in config.weights:
            straight = partial(mix, weight=weight)
            made[f"{path} {weight:g}"] = (partial(straight, path=path), straight)
    for side in config.halves:
        half((2, 2), side)  # raises for an unknown one

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
        made[f"{len(chosen)} channels"] = (partial(swap_channels, channels=chosen), None)
    return made


def grid(
    model: Inverter, first: Tensor, second: Tensor, config: DictConfig
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return name and way -> what measures the mixtures of all pairs.

    Args:
        model: Draws.
        first: The pairs' first images, uint8, shape (N, 3, H, W).
        second: Their second images.
        config: The experiment's.
    """
    (a, logits_a), (b, logits_b) = (see(model.backbone, images) for images in (first, second))
    classes = {"first": logits_a.argmax(1), "second": logits_b.argmax(1)}

    def row(in_features: Mixer, in_pixels: Mixer | None) -> dict[str, Tensor]:
        def rows(chunk: Tensor) -> dict[str, Tensor]:
            target = condition = in_features(a[chunk], b[chunk])
            if in_pixels is not None:
                mixed = in_pixels(*(from_uint8(images[chunk]) for images in (first, second)))
                condition, _ = see(model.backbone, to_uint8(mixed.clamp(-1, 1)))
            draws = harness.draw_samples(model, condition, chunk, config)
            classified = {
                name: draws.probability(labels[chunk].to(model.device))
                for name, labels in classes.items()
            }
            cosine = draws.cosine(target.to(model.device))
            return {"drawn": draws.first(), "cosine": cosine} | classified

        return harness.in_chunks(len(first), config, rows)

    made = {}
    for name, (in_features, in_pixels) in mixers(config, a.shape[1]).items():
        made[f"{name}, features"] = partial(row, in_features, None)
        if in_pixels is not None:
            made[f"{name}, pixels"] = partial(row, in_features, in_pixels)
    return made


def strips(a: Tensor, b: Tensor, results: dict, names: list[str], title: str) -> Figure:
    """Draw, for each pair, the first image, the mixtures in features and in pixels, the second."""
    pictures, captions, rows = [], [], []
    blank = {"drawn": torch.full_like(a, 255)}
    for i in range(len(a)):
        for way in ("features", "pixels"):
            if not any(way in results[name] for name in names):
                continue
            found = [results[name].get(way, blank) for name in names]
            pictures.append([a[i], *(values["drawn"][i] for values in found), b[i]])
            cosines = [f"cosine {v['cosine'][i]:.2f}" if "cosine" in v else "" for v in found]
            captions.append(["", *cosines, ""])
            rows.append(way)
    columns = ["first", *names, "second"]
    return gallery_figure(pictures, rows, columns, captions, title)


def main(config: DictConfig) -> None:
    """Mix every pair in every way, write table and strips."""
    model, config, sampling = open_setting(Setting("checkpoint", config.checkpoint), config)
    model.backbone.check_classifies()
    images = harness.load_images(config, model)["image"]
    if len(images) < 2:
        raise InputError("A mixture takes two images, got one: expected num_images=2 or more.")
    pair = images, images.roll(-1, 0)
    depends_on = dependencies(config, config.checkpoint)
    found = harness.measure(grid(model, *pair, config), depends_on, config)
    results: dict[str, dict[str, dict[str, Tensor]]] = {}
    rows = []
    for cells in harness.interval_rows(found, COLUMNS, "mixture"):
        name, way = cells["mixture"].rsplit(", ", 1)
        results.setdefault(name, {})[way] = found[cells["mixture"]]
        rows.append({"mixture": name, "mixed in": way} | cells | {"mixture": name})
    where = f"{model.backbone.name}, layer {model.backbone.layer}"
    title = f"mixtures of the features of {where}; same noise"
    files = {path: [name for name in results if name.startswith(path)] for path in config.paths}
    files["splices"] = [name for name in results if not name.startswith(tuple(config.paths))]
    for file, names in files.items():
        if names:
            small = (part[: config.num_pictures] for part in pair)
            figure = strips(*small, results, names, title)
            save_figure(figure, Path(config.output) / f"{file}.png")
    about = harness.measured_caption(len(images), config, sampling, "pairs")
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "mixtures")
