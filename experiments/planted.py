"""Marks for inverters: what they keep and what they invent, where the right answer is known.

python experiments/planted.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

A checkpoint is scored on the planted truth that it was trained on (`train.py backbone=planted
backbone.name=mirror`). Optimisation of pixels and guidance of a prior need no training and are
scored on all truths.
"""

import logging
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv import FeatInv
from featinv.analysis.calibration import Calibration, other_images
from featinv.analysis.planted import Mirror, Planted, kept_error, load_planted
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.tables import format_interval
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.models.pixel_optimization import PixelOptimization
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import Setting, dependencies, find_models, open_model

log = logging.getLogger("planted")


class Method(NamedTuple):
    """What inverts a planted truth: a model, its checkpoint if any, and values of its sampler."""

    model: Inverter
    checkpoint: str | None
    sampler: dict


def find_methods(truth: Planted, config: DictConfig) -> dict[str, Method]:
    """Return name -> method of all that inverts a truth.

    Raises:
        InputError: A checkpoint was not trained on a planted truth.
    """
    found = {}
    if config.pixels:
        pixels = PixelOptimization(truth, config.image_size)
        found["optimisation of pixels"] = Method(pixels, None, {})
    if config.prior is not None:
        prior = FeatInv.load(config.prior)
        prior.backbone = truth  # which its guidance looks at, and nothing else
        found["guidance of the prior"] = Method(prior, config.prior, config.guided)
    for name, checkpoint in find_models(config.checkpoints or []).items():
        model = open_model(checkpoint, config)
        if not isinstance(model.backbone, Planted):
            raise InputError(
                f"'{name}' was trained on '{model.backbone.name}': expected models of planted "
                "truths, trained with backbone=planted."
            )
        if model.backbone.name == truth.name:
            name = name.removeprefix(f"{truth.name}_")
            settings = config.settings if isinstance(model, FeatInv) else {"": {}}
            for setting, values in settings.items():
                found[f"{name} {setting}".strip()] = Method(model, checkpoint, values or {})
    return found


@torch.no_grad()
def measure(model: Inverter, config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image from the features of the model's planted truth, and mark them.

    Args:
        model: Inverts.
        config: The experiment's, with the method's values of the sampler.

    Returns:
        `kept`, the kept error, (N,); `between` and `to_original`, distances of `discarded` as in
        `Calibration`, (N,); `mode`, (N, S), for `Mirror` only; `samples` of the first images.
    """
    model = model.to(pick_device(config.device)).eval()
    truth, images = model.backbone, harness.load_images(config, model)
    whole, indices = from_uint8(images["image"].to(model.device)), images["index"]
    others = whole[other_images(images["label"].tolist())]
    calibration = Calibration(config.num_samples)

    def mark(rows: Tensor) -> dict[str, Tensor]:
        originals = whole[rows]
        features = truth.features(originals)
        flat = harness.draw_samples(model, features, indices[rows], config).images
        samples = flat.unflatten(0, (len(rows), -1))
        discarded = truth.discarded(flat).unflatten(0, samples.shape[:2])
        calibration.update(discarded, truth.discarded(originals))
        found = {"kept": kept_error(truth, samples, originals, others[rows]).cpu()}
        if isinstance(truth, Mirror):
            repeated = originals.repeat_interleave(config.num_samples, 0)
            found["mode"] = truth.mode(flat, repeated).view(samples.shape[:2]).cpu()
        return found | {"samples": to_uint8(samples[:, :2]).cpu()}

    values = harness.in_chunks(len(whole), config, mark) | calibration.numbers()
    return values | {"ratio": torch.tensor(calibration.ratio())}


def table_row(values: dict[str, Tensor]) -> dict[str, str]:
    """Return the marks of a method, as text."""
    kept = values["kept"]
    cells = {
        "kept error (0)": format_interval(float(kept.mean()), *bootstrap_interval(kept)),
        "invented spread (1)": format_interval(*values["ratio"].tolist()),
    }
    if "mode" in values:
        # In a mode is what is nearer to it than to the mean of both.
        original, mirrored = values["mode"] > 0.5, values["mode"] < -0.5
        for title, samples in {
            "in the original's mode (0.5)": original,
            "in neither mode (0)": ~original & ~mirrored,
        }.items():
            cells[title] = format_interval(**harness.interval(samples.float().mean(dim=1)))
        both = (original.any(dim=1) & mirrored.any(dim=1)).float().mean()
        cells["images in both modes"] = f"{float(both):.2f}"
    return cells


def kept_picture(truth: Planted, image: Tensor) -> Tensor:
    """Return what is kept as a picture, uint8; of two mirror images their mean."""
    images = truth.preprocess(image[None])
    if isinstance(truth, Mirror):
        return to_uint8((images + images.flip(3)) / 2)[0]
    return to_uint8(truth.kept(images))[0]


def figure(
    truths: dict[str, Planted], images: Tensor, results: dict[str, dict[str, dict]]
) -> Figure:
    """Draw rows for each truth: original, what is kept, two samples of every method."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    blank = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    pictures, rows = [], []
    for name, truth in truths.items():
        for i, image in enumerate(images):
            row = [to_uint8(resize(image[None], truth.image_size))[0], kept_picture(truth, image)]
            for method in names:
                found = results[name].get(method)
                row += [blank, blank] if found is None else list(found["samples"][i])
            pictures.append(row)
            rows.append(name)
    columns = ["original", "kept", *(part for name in names for part in (name, "another sample"))]
    return gallery_figure(pictures, rows, columns)


def main(config: DictConfig) -> None:
    """Mark every method on every truth, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    truths = {name: load_planted(name, config.image_size) for name in config.truths}
    if not truths:
        raise InputError("truths is [], expected for example [luminance,mirror].")
    rows, results = [], defaultdict(dict)
    for name, truth in truths.items():
        for method, (model, checkpoint, sampler) in find_methods(truth, config).items():
            own = Setting(method, "", dict(sampler)).apply(config)
            row = {f"{name} {method}": partial(measure, model, own)}
            (values,) = harness.measure(row, dependencies(own, checkpoint), config).values()
            results[name][method] = values
            rows.append({"truth": name, "method": method} | table_row(values))
            log.info("%s: %s", name, rows[-1])
    output = Path(config.output)
    shown = from_uint8(harness.load_images(config, model)["image"][: config.num_pictures])
    truths = {name: truth.cpu() for name, truth in truths.items()}
    save_figure(figure(truths, shown, results), output / "planted.png")
    number = len(values["kept"])
    about = (
        f"{number} images, {config.num_samples} samples each, seed {config.seed}; in brackets what "
        "is right; mean over images with 95% bootstrap interval. Of right samples, "
        f"{1 - 2 ** (1 - config.num_samples):.2f} of the images are in both modes."
    )
    harness.publish_measured(rows, results, about, config)


if __name__ == "__main__":
    run_entry_point(main, "planted")
