"""What inverters keep and what they invent, measured where the right answer is known.

python experiments/planted.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

A checkpoint is scored on the planted truth that it was trained on (`train.py backbone=planted
backbone.name=mirror`). The optimisation of pixels and the guidance of a prior need no training and
are scored on all truths.
"""

from functools import partial
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv import FeatInv
from featinv.analysis.calibration import ratio_interval
from featinv.analysis.planted import Mirror, Planted, kept_error, load_planted
from featinv.cli.app import open_model, run_entry_point
from featinv.evaluation.pairing import other_images
from featinv.evaluation.tables import format_interval
from featinv.metrics import sample_distances
from featinv.models.base import Inverter
from featinv.models.pixel_optimization import PixelOptimization
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from harness import Column
from settings import Setting, dependencies, find_models


class Method(NamedTuple):
    """What inverts a planted truth: a model, its checkpoint if any, and values of its sampler."""

    model: Inverter
    checkpoint: str | None
    sampler: dict


def find_methods(truth: Planted, config: DictConfig) -> dict[str, Method]:
    """Return name -> method of all that invert a truth."""
    found = {}
    if config.pixels:
        pixels = PixelOptimization(truth, config.image_size)
        found["optimisation of pixels"] = Method(pixels, None, {})
    if config.prior is not None:
        prior = FeatInv.load(config.prior)
        prior.backbone = truth  # only its guidance uses it
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
    """Draw samples of every image from the features of the model's planted truth, and score them.

    Returns `kept`, the kept error, (N,); `between` and `to_original`, distances of `discarded` as
    in `sample_distances`, (N,); `mode`, (N, S), for `Mirror` only; two `samples` of each, uint8.
    """
    model = model.to(pick_device(config.device)).eval()
    truth, images = model.backbone, load_images(config, model)
    whole = from_uint8(images["image"].to(model.device))
    others = whole[other_images(images["label"].tolist())]

    def draw(rows: Tensor) -> dict[str, Tensor]:
        originals, shape = whole[rows], (len(rows), -1)
        features, indices = truth.features(originals), images["index"][rows]
        flat = draw_samples(model, features, indices, config).images
        samples = flat.unflatten(0, shape)
        discarded = truth.discarded(flat).unflatten(0, shape)
        between, to_original = sample_distances(discarded, truth.discarded(originals))
        found = {
            "kept": kept_error(truth, samples, originals, others[rows]).cpu(),
            "between": between.cpu(),
            "to_original": to_original.cpu(),
        }
        if isinstance(truth, Mirror):
            repeated = originals.repeat_interleave(config.num_samples, 0)
            found["mode"] = truth.mode(flat, repeated).view(shape).cpu()
        return found | {"samples": to_uint8(samples[:, :2]).cpu()}

    return in_chunks(images, config, draw)


def table_row(values: dict[str, Tensor]) -> dict[str, str]:
    """Return the scores of a method, as text."""
    cells = {
        "kept error (0)": harness.cell(values, "kept"),
        "invented spread (1)": format_interval(*values["ratio"].tolist()),
    }
    if "mode" in values:
        # A sample belongs to the mode that is nearer to it than the mean of both modes.
        original, mirrored = values["mode"] > 0.5, values["mode"] < -0.5
        for title, samples in {
            "in the original's mode (0.5)": original,
            "in neither mode (0)": ~original & ~mirrored,
        }.items():
            cells[title] = harness.cell(values | {"share": samples.float().mean(dim=1)}, "share")
        both = (original.any(dim=1) & mirrored.any(dim=1)).float().mean()
        cells["images in both modes"] = f"{float(both):.2f}"
    return cells


def kept_picture(truth: Planted, image: Tensor) -> Tensor:
    """Return what is kept as a picture, uint8; of two mirror images their mean."""
    images = truth.preprocess(image[None])
    if isinstance(truth, Mirror):
        return to_uint8((images + images.flip(3)) / 2)[0]
    return to_uint8(truth.kept(images))[0]


def figure_columns(truth: Planted, images: Tensor, results: harness.Results) -> list[Column]:
    """Return originals, what is kept of them, and two samples of every method."""
    originals = to_uint8(resize(images, truth.image_size))
    kept = [kept_picture(truth, image) for image in images]
    columns = [Column("original", originals), Column("kept", kept)]
    for method, values in results.items():
        columns.append(Column(method, values["samples"][:, 0]))
        columns.append(Column("another sample", values["samples"][:, 1]))
    return columns


def measure_truth(truth: Planted, config: DictConfig) -> harness.Results:
    """Return method -> scores of a truth, and draw its figure."""
    results = {}
    for name, (model, checkpoint, sampler) in find_methods(truth, config).items():
        method_config = Setting(name, "", dict(sampler)).apply(config)
        row = {f"{truth.name} {name}": partial(measure, model, method_config)}
        wanted = dependencies(method_config, checkpoint)
        (values,) = harness.measure(row, wanted, config).values()
        pairs = (values[key] for key in ("between", "to_original", "photograph"))
        values["ratio"] = torch.tensor(ratio_interval(*pairs))
        results[name] = values
        harness.log.info("%s, %s: %s", truth.name, name, table_row(values))
    if results:
        images = load_images(config, PixelOptimization(truth, config.image_size))["image"]
        columns = figure_columns(truth.cpu(), from_uint8(images[: config.num_pictures]), results)
        harness.save_pictures(columns, f"{config.output}/planted_{truth.name}.png")
    return results


def main(config: DictConfig) -> None:
    """Score every method on every truth, write the table, and a figure for each truth."""
    at_least("num_samples", config.num_samples, 2)
    truths = {name: load_planted(name, config.image_size) for name in config.truths}
    results = {name: measure_truth(truth, config) for name, truth in truths.items()}
    rows = [
        {"truth": name, "method": method} | table_row(values)
        for name, methods in results.items()
        for method, values in methods.items()
    ]
    if not rows:
        raise InputError(
            f"Nothing inverts the truths {list(truths)}: expected a model of one of them in "
            "checkpoints, prior or pixels=true."
        )
    number = len(next(v for methods in results.values() for v in methods.values())["kept"])
    about = (
        f"{number} images, {config.num_samples} samples each, seed {config.seed}; in "
        "brackets what is right; mean over images with 95% bootstrap interval over photographs. Of "
        f"correct samples, {1 - 2 ** (1 - config.num_samples):.2f} of the images are in both modes."
    )
    harness.publish(rows, about, config, results)


if __name__ == "__main__":
    run_entry_point(main, "planted")
