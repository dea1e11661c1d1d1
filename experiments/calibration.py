"""Are samples as different as they should be? Calibration of a model over settings of its sampler.

python experiments/calibration.py checkpoint=RUN data=imagenette data.root=PATH

Ratios of 1 are honest, below 1 overconfident, above 1 too wild (featinv/analysis/calibration.py),
in several spaces: the picture, its 8x8 blocks' mean colours, the model's latents, and the features
of a classifier that took no part. The cosine beside them says which settings are only pretty. The
original counts as it is, so in pixels a codec's loss makes samples look overconfident; in the
latents it does not.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from featinv import FeatInv
from featinv.analysis.calibration import Calibration, other_images
from featinv.backbones import Backbone
from featinv.checkpoints import load_model
from featinv.cli.app import command, run_entry_point, sampler_options
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.plots import new_figure
from featinv.evaluation.set_metrics import extractor_backbone
from featinv.evaluation.tables import format_interval
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.utils.errors import at_least
from featinv.utils.files import atomic_write
from featinv.utils.pixels import eight_bit, from_uint8, resize
from settings import Setting, dependencies, find_settings, open_setting

Space = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to points (B, ...)


def spaces(model: Inverter, witness: Backbone | None) -> dict[str, Space]:
    """Return the spaces in which images have a distance, by name."""
    found: dict[str, Space] = {
        "pixels": lambda images: images,
        "low pass": lambda images: F.avg_pool2d(images, 8),
    }
    if codec := getattr(model, "codec", None):
        found["latents"] = codec.encode
    if witness is not None:
        found["witness"] = witness.features
    return found


@torch.no_grad()
def measure(setting: Setting, config: DictConfig) -> dict[str, Tensor]:
    """Draw samples of every image.

    Returns:
        `cosine`, (N,), and for each space `SPACE/NAME`, the numbers of its `Calibration`.
    """
    model, config, _ = open_setting(setting, config)
    witness = None
    if config.witness is not None:
        witness = extractor_backbone(config.witness, "witness").to(model.device)
    images = harness.load_images(config, model)
    others = other_images(images["label"].tolist())
    originals = eight_bit(resize(from_uint8(images["image"]), model.image_size))
    measured = {name: Calibration(config.num_samples) for name in spaces(model, witness)}

    def look(rows: Tensor) -> dict[str, Tensor]:
        features = model.backbone.features(from_uint8(images["image"][rows].to(model.device)))
        draws = harness.draw_samples(model, features, images["index"][rows], config)
        pictures = (originals[rows], originals[[others[int(i)] for i in rows]])
        for name, space in spaces(model, witness).items():
            samples = space(draws.images).unflatten(0, (len(rows), -1))
            measured[name].update(samples, *(space(part.to(model.device)) for part in pictures))
        return {"cosine": draws.cosine(features)}

    cosines = harness.in_chunks(len(others), config, look)
    numbers = {
        f"{name}/{key}": values
        for name, calibration in measured.items()
        for key, values in calibration.numbers().items()
    }
    return cosines | numbers


def calibrations(values: dict[str, Tensor], num_samples: int) -> dict[str, Calibration]:
    """Return space -> calibration of a setting, from what `measure` returned."""
    numbers = defaultdict(dict)
    for name, numbers_of in values.items():
        if "/" in name:
            space, key = name.split("/")
            numbers[space][key] = numbers_of
    return {space: Calibration.of(num_samples, found) for space, found in numbers.items()}


def table_row(measured: dict[str, Calibration], cosines: Tensor) -> dict[str, str]:
    """Return the cells of a setting, as text."""
    cells = {"cosine": format_interval(float(cosines.mean()), *bootstrap_interval(cosines))}
    for name, calibration in measured.items():
        cells[f"ratio, {name}"] = format_interval(*calibration.ratio())
    first = next(iter(measured.values()))
    cells["off by a factor of"] = f"{off(measured):.3f}"
    cells["flat ranks, pixels: p"] = f"{first.p_value():.2g}"
    cells["coverage, pixels: p"] = f"{first.p_value('reference_ranks'):.2g}"
    return cells


def off(measured: dict[str, Calibration]) -> float:
    """Return by what factor the ratios are off, the geometric mean over the spaces: 1 is right."""
    with np.errstate(divide="ignore"):  # samples without any difference are off by infinity
        logs = np.abs(np.log([calibration.ratio()[0] for calibration in measured.values()]))
    return float(np.exp(logs.mean()))


def write_sampler(setting: Setting, config: DictConfig) -> None:
    """Write how a setting draws as `calibrated.yaml`, a choice for configs/sampler."""
    model, config, _ = open_setting(setting, config)
    values = asdict(model.settings(**sampler_options(config)))
    head = f"# Of the settings in {command()}\n# the one whose calibration ratios are nearest 1.\n"
    with atomic_write(Path(config.output) / "calibrated.yaml") as file:
        target = {"_target_": "featinv.sampling.SamplerConfig"}
        file.write((head + yaml.safe_dump(target | values, sort_keys=False)).encode())


def figure(results: dict[str, dict[str, Calibration]]) -> Figure:
    """Draw ratios, rank histograms and coverage of every setting, each space in a row."""
    names = list(next(iter(results.values())))
    figure, panels = new_figure(9, 2.6 * len(names), len(names), ncols=3, squeeze=False)
    for axes, space in zip(panels, names, strict=True):
        for i, (setting, measured) in enumerate(results.items()):
            calibration = measured[space]
            value, low, high = calibration.ratio()
            axes[0].errorbar(
                value, i, xerr=[[value - low], [high - value]], fmt="o", color=f"C{i}", capsize=3
            )
            histogram = calibration.histogram() / len(calibration["ranks"])
            axes[1].step(range(len(histogram)), histogram, where="mid", color=f"C{i}")
            covered = calibration.coverage()
            axes[2].plot(covered["level"], covered["coverage"], color=f"C{i}", label=setting)
            axes[2].fill_between(
                covered["level"], covered["low"], covered["high"], color=f"C{i}", alpha=0.15
            )
        axes[0].axvline(1, color="grey", linewidth=0.8)
        axes[0].set_yticks(range(len(results)), list(results), fontsize=6)
        axes[1].axhline(1 / len(histogram), color="grey", linewidth=0.8)
        axes[2].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        style_axes(axes[0], f"calibration ratio, {space}", "")
        style_axes(axes[1], "rank of the original", "share of images")
        style_axes(axes[2], "credible level", "coverage")
    return figure


def main(config: DictConfig) -> None:
    """Measure every setting, write table and figure, and name the most honest one."""
    at_least("num_samples", config.num_samples, 2)
    settings, results, measured = {}, {}, {}
    for setting in find_settings(config):
        own, settings[setting.name] = setting.apply(config), setting
        row = {setting.name: partial(measure, setting, config)}
        results |= harness.measure(row, dependencies(own, setting.checkpoint, "witness"), config)
        measured[setting.name] = calibrations(results[setting.name], config.num_samples)
    rows = [
        {"setting": name} | table_row(measured[name], values["cosine"])
        for name, values in results.items()
    ]
    save_figure(figure(measured), Path(config.output) / "calibration.png")
    honest = min(measured, key=lambda name: off(measured[name]))
    if isinstance(load_model(settings[honest].checkpoint), FeatInv):
        write_sampler(settings[honest], config)
    numbers = {
        name: {"cosine": results[name]["cosine"]} | {k: c.numbers() for k, c in spaces_of.items()}
        for name, spaces_of in measured.items()
    }
    number = len(results[honest]["cosine"])
    about = (
        f"{number} images, {config.num_samples} samples each, seed {config.seed}; witness "
        f"{config.witness}; 95% bootstrap intervals over images. A ratio of 1 is calibrated, "
        "below 1 overconfident; p-values of chi-square tests that the original's ranks are flat. "
        f"Nearest to 1: {honest}."
    )
    harness.publish_measured(rows, numbers, about, config)


if __name__ == "__main__":
    run_entry_point(main, "calibration")
