"""Marks for inverters: what they keep and what they invent, where the right answer is known.

python experiments/planted.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

A checkpoint is scored on the planted truth that it was trained on (`train.py backbone=planted
backbone.name=mirror`). Optimisation of pixels and guidance of a prior need no training and are
scored on all truths.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv import FeatInv
from featinv.analysis.calibration import Calibration, other_images
from featinv.analysis.planted import Mirror, Planted, kept_error, load_planted
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import gallery_figure, save_figure
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.models.pixel_optimization import PixelOptimization
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import Setting, find_models, open_model

log = logging.getLogger("planted")


def methods(truth: Planted, models: dict[str, Inverter], config: DictConfig) -> Iterator[tuple]:
    """Yield name, model and sampler values of all that inverts a truth."""
    if config.pixels:
        yield "optimisation of pixels", PixelOptimization(truth, config.image_size), {}
    if config.prior is not None:
        prior = FeatInv.load(config.prior)
        prior.backbone = truth  # which its guidance looks at, and nothing else
        yield "guidance of the prior", prior, config.guided
    for name, model in models.items():
        if model.backbone.name == truth.name:
            several = isinstance(model, FeatInv)
            for setting, values in config.settings.items() if several else [("", {})]:
                yield f"{name} {setting}".strip(), model, values or {}


@torch.no_grad()
def measure(model: Inverter, batches: list[dict], config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image from the features of the model's planted truth, and mark them.

    Returns:
        `kept`, the kept error, (N,); `between` and `to_original`, distances of `discarded` as in
        `Calibration`, (N,); `mode`, bool, (N, S), for `Mirror` only; `samples` of the first images.
    """
    truth = model.backbone
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    whole = from_uint8(torch.cat([batch["image"] for batch in batches])).to(model.device)
    others = whole[other_images(labels)]
    indices = torch.cat([batch["index"] for batch in batches])
    calibration = Calibration(config.num_samples)
    found = defaultdict(list)
    for rows in tqdm(torch.arange(len(whole)).split(8), unit="batch", leave=False):
        originals = whole[rows]
        draws = harness.draw_samples(model, truth.features(originals), indices[rows], config)
        flat, shape = draws.images, (len(rows), config.num_samples)
        samples = flat.unflatten(0, shape)
        found["kept"].append(kept_error(truth, samples, originals, others[rows]).cpu())
        discarded = truth.discarded(flat).unflatten(0, shape)
        calibration.update(discarded, truth.discarded(originals))
        if isinstance(truth, Mirror):
            repeated = originals.repeat_interleave(config.num_samples, 0)
            found["mode"].append(truth.mode(flat, repeated).view(shape).cpu())
        found["samples"].append(to_uint8(samples[:, :2]).cpu())
    values = {name: torch.cat(parts) for name, parts in found.items()}
    values |= {name: calibration[name] for name in ("between", "to_original")}
    return values | {"ratio": torch.tensor(calibration.ratio())}


def table_row(values: dict[str, Tensor]) -> dict[str, str]:
    """Return the marks of a method, as text."""
    kept = values["kept"]
    cells = {
        "kept error (0)": format_interval(float(kept.mean()), *bootstrap_interval(kept)),
        "invented spread (1)": format_interval(*values["ratio"].tolist()),
    }
    if "mode" in values:
        share = values["mode"].float().mean(dim=1)
        both = ((share > 0) & (share < 1)).float().mean()
        cells["in the original's mode (0.5)"] = format_interval(
            float(share.mean()), *bootstrap_interval(share)
        )
        cells["images in both modes"] = f"{float(both):.2f}"
    return cells


def kept_picture(truth: Planted, image: Tensor) -> Tensor:
    """Return what is kept as a picture, uint8; of two mirror images their mean."""
    images = truth.preprocess(image[None])
    if isinstance(truth, Mirror):
        return to_uint8((images + images.flip(3)) / 2)[0]
    return to_uint8(truth.kept(images))[0]


def figure(
    truths: dict[str, Planted], image: Tensor, results: dict[str, dict[str, dict]]
) -> Figure:
    """Draw a row for each truth: original, what is kept, two samples of every method."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    blank = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    pictures = []
    for name, truth in truths.items():
        row = [to_uint8(resize(image[None], truth.image_size))[0], kept_picture(truth, image)]
        for method in names:
            found = results[name].get(method)
            row += [blank, blank] if found is None else list(found["samples"][0])
        pictures.append(row)
    columns = ["original", "kept", *(part for name in names for part in (name, "another sample"))]
    return gallery_figure(pictures, list(truths), columns)


def main(config: DictConfig) -> None:
    """Mark every method on every truth, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    device = pick_device(config.device)
    truths = {name: load_planted(name, config.image_size).to(device) for name in config.truths}
    if not truths:
        raise InputError("truths is [], expected for example [luminance,mirror].")
    models = {}
    for name, checkpoint in find_models(config.checkpoints or []).items():
        models[name] = open_model(checkpoint, config)
        if not isinstance(models[name].backbone, Planted):
            raise InputError(
                f"'{name}' was trained on '{models[name].backbone.name}': expected models of "
                "planted truths, trained with backbone=planted."
            )
    rows, results = [], defaultdict(dict)
    for name, truth in truths.items():
        for method, model, values in methods(truth, models, config):
            model = model.to(device).eval()
            batches = list(make_batches(config, model))
            own = Setting(method, "", dict(values)).apply(config)
            results[name][method] = measure(model, batches, own)
            rows.append({"truth": name, "method": method} | table_row(results[name][method]))
            log.info("%s: %s", name, rows[-1])
    output = Path(config.output)
    first = from_uint8(batches[0]["image"][0]).to(device)
    save_figure(figure(truths, first, results), output / "planted.png")
    save_numbers(results, output / "results.json")
    number = len(next(iter(results[name].values()))["kept"])
    about = (
        f"{number} images, {config.num_samples} samples each, seed {config.seed}; in brackets what "
        "is right; mean over images with 95% bootstrap interval. Of right samples, "
        f"{1 - 2 ** (1 - config.num_samples):.2f} of the images are in both modes."
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "planted")
