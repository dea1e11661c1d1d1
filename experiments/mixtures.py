"""What lies between two images in feature space: interpolations, splices and swaps, inverted.

python experiments/mixtures.py checkpoint=RUN data=imagenette data.root=PATH

Each image is mixed with the next one of another class. All mixtures of a pair share their noise.
Beside each stands a baseline: mix the pixels first, then invert the features of that.
"""

from collections.abc import Callable
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv.analysis.edits import PATHS, half, mix, splice
from featinv.cli.app import run_entry_point
from featinv.evaluation.draws import extract
from featinv.evaluation.pairing import other_images
from featinv.models.base import Inverter
from featinv.utils.errors import unknown
from featinv.utils.pixels import from_uint8, to_uint8
from featinv.utils.seeding import make_generator
from harness import Column
from settings import dependencies, open_checkpoint

Mixer = Callable[[Tensor, Tensor], Tensor]  # two images or feature maps -> one

COLUMNS = {
    "cosine": "spatial cosine to the mixture",
    "first": "probability of the first's class",
    "second": "probability of the second's class",
}


def mixers(config: DictConfig, num_channels: int) -> dict[str, tuple[Mixer, Mixer | None]]:
    """Return name -> how to mix features, and how to mix pixels, if that has a meaning."""
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
            return splice(a, b, half(a.shape[2:], side))

        made[f"{side} half"] = (take, take)
    if config.channels is not None:
        number = harness.count("channels", config.channels, num_channels)
        order = torch.randperm(num_channels, generator=make_generator(config.seed))
        chosen = torch.isin(torch.arange(num_channels), order[:number])[:, None, None]
        made[f"{number} channels"] = (partial(splice, mask=chosen), None)
    return made


def grid(model: Inverter, images: dict, others: list[int], config: DictConfig) -> dict:
    """Return "mixture, way" -> function that measures it for each image and its other one."""
    first, second = images["image"], images["image"][others]
    (a, logits_a), (b, logits_b) = (extract(model.backbone, part) for part in (first, second))
    classes = {"first": logits_a.argmax(1), "second": logits_b.argmax(1)}

    def mixture(in_features: Mixer, in_pixels: Mixer | None, rows: Tensor) -> dict[str, Tensor]:
        target = condition = in_features(a[rows], b[rows])
        if in_pixels is not None:
            mixed = in_pixels(*(from_uint8(part[rows]) for part in (first, second)))
            condition, _ = extract(model.backbone, to_uint8(mixed.clamp(-1, 1)))
        draws = draw_samples(model, condition, images["index"][rows], config)
        probabilities = {
            name: draws.probability(labels[rows].to(model.device))
            for name, labels in classes.items()
        }
        cosine = draws.cosine(target.to(model.device))
        return {"drawn": draws.first(), "cosine": cosine} | probabilities

    ways = {}
    for name, (in_features, in_pixels) in mixers(config, a.shape[1]).items():
        ways[f"{name}, features"] = partial(mixture, in_features, None)
        if in_pixels is not None:
            ways[f"{name}, pixels"] = partial(mixture, in_features, in_pixels)
    return {name: partial(in_chunks, images, config, way) for name, way in ways.items()}


def save_strips(
    first: Tensor, second: Tensor, results: harness.Results, path: str, title: str
) -> None:
    """Draw each pair, and between them its mixtures, a column for each way of mixing."""
    columns = [Column("first", first)]
    for name, values in results.items():
        captions = [f"cosine {cosine:.2f}" for cosine in values["cosine"]]
        columns.append(Column(name, values["drawn"], captions))
    harness.save_pictures([*columns, Column("second", second)], path, title)


def main(config: DictConfig) -> None:
    """Mix every pair in every way, write table and figures."""
    model, sampling = open_checkpoint(config)
    model.backbone.check_classifies()
    images = load_images(config, model)
    others = other_images(images["label"].tolist())
    depends_on = dependencies(config, config.checkpoint) | {"others": others}
    found = harness.measure(grid(model, images, others, config), depends_on, config)
    rows = []
    results: dict[str, dict[str, dict[str, Tensor]]] = {}  # mixture -> way -> value
    for cells in harness.interval_rows(found, COLUMNS, "mixture"):
        name, way = cells["mixture"].rsplit(", ", 1)
        results.setdefault(name, {})[way] = found[cells["mixture"]]
        rows.append({"mixture": name, "mixed in": way} | cells | {"mixture": name})
    files = {path: [name for name in found if name.startswith(path)] for path in config.paths}
    files["splices"] = [name for name in found if not name.startswith(tuple(config.paths))]
    title = f"mixtures of the features of {model.backbone.name}, layer {model.backbone.layer}; "
    for file, names in files.items():
        if names:
            pair, path = (images["image"], images["image"][others]), f"{config.output}/{file}.png"
            strips = {name: found[name] for name in names}
            save_strips(*pair, strips, path, f"{title}same noise")
    about = harness.measured_caption(len(others), config, sampling, "pairs")
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "mixtures")
