"""Are samples as different as they should be? Calibration of a model by settings of its sampler.

python experiments/calibration.py checkpoint=RUN data=imagenette data.root=PATH

A ratio of 1 is calibrated, below 1 overconfident, above 1 underconfident
(`featinv/analysis/calibration.py`). It is measured in several spaces: pixels, the mean colours of
8x8 blocks, the model's latents, and the features of a classifier that took no part. The cosine
beside it shows which settings are merely pretty. In pixels the original counts as it is, so the
loss of a codec makes samples look overconfident; in the latents it does not.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import harness
from drawing import draw_samples, in_chunks, load_images
from featinv import FeatInv
from featinv.analysis.calibration import Calibration, other_images
from featinv.backbones import Backbone
from featinv.checkpoints import load_model
from featinv.cli.app import command, run_entry_point, sampler_options
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import new_figure, style_axes
from featinv.evaluation.set_metrics import extractor_backbone
from featinv.evaluation.tables import format_interval
from featinv.models.base import Inverter
from featinv.utils.files import write_text
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
        `cosine`, (N,), and the numbers of each space's `Calibration`, as `SPACE/NAME`.
    """
    model, config, _ = open_setting(setting, config)
    witness = None
    if config.witness is not None:
        witness = extractor_backbone(config.witness, "witness").to(model.device)
    images = load_images(config, model)
    others = torch.tensor(other_images(images["label"].tolist()))
    originals = eight_bit(resize(from_uint8(images["image"]), model.image_size))
    measured = {name: Calibration(config.num_samples) for name in spaces(model, witness)}

    def draw(rows: Tensor) -> dict[str, Tensor]:
        features = model.backbone.features(from_uint8(images["image"][rows].to(model.device)))
        draws = draw_samples(model, features, images["index"][rows], config)
        pictures = [originals[which].to(model.device) for which in (rows, others[rows])]
        for name, space in spaces(model, witness).items():
            samples = space(draws.images).unflatten(0, (len(rows), -1))
            measured[name].update(samples, *map(space, pictures))
        return {"cosine": draws.cosine(features)}

    values = in_chunks(images, config, draw)
    for name, calibration in measured.items():
        values |= {f"{name}/{key}": numbers for key, numbers in calibration.numbers().items()}
    return values


def calibrations(values: dict[str, Tensor], num_samples: int) -> dict[str, Calibration]:
    """Return space -> calibration of a setting, from what `measure` returned."""
    numbers = defaultdict(dict)
    for name in values:
        if "/" in name:
            space, key = name.split("/")
            numbers[space][key] = values[name]
    return {space: Calibration.of(num_samples, found) for space, found in numbers.items()}


def table_row(measured: dict[str, Calibration]) -> dict[str, str]:
    """Return the cells of a setting, as text."""
    cells = {f"ratio, {name}": format_interval(*c.ratio()) for name, c in measured.items()}
    cells["off by a factor of"] = f"{off(measured):.3f}"
    cells["flat ranks, pixels: p"] = f"{measured['pixels'].p_value():.2g}"
    cells["coverage, pixels: p"] = f"{measured['pixels'].p_value('reference_ranks'):.2g}"
    return cells


def off(measured: dict[str, Calibration]) -> float:
    """Return the factor by which ratios differ from 1, the geometric mean over the spaces."""
    with np.errstate(divide="ignore"):  # identical samples are off by infinity
        logs = np.abs(np.log([calibration.ratio()[0] for calibration in measured.values()]))
    return float(np.exp(logs.mean()))


def write_sampler(setting: Setting, config: DictConfig) -> None:
    """Write the sampler of a setting to `calibrated.yaml`, an option for configs/sampler."""
    model, own, _ = open_setting(setting, config)
    values = asdict(model.settings(**sampler_options(own)))
    values = {"_target_": "featinv.sampling.SamplerConfig", **values}
    head = f"# Of the settings in {command()}\n# the one whose calibration ratios are nearest 1.\n"
    text = head + yaml.safe_dump(values, sort_keys=False)
    write_text(f"{config.output}/calibrated.yaml", text)


def calibration_figure(results: dict[str, dict[str, Calibration]]) -> Figure:
    """Draw ratios, rank histograms and coverage of every setting, a row for each space."""
    names = list(next(iter(results.values())))
    figure, panels = new_figure(9, 2.6 * len(names), len(names), ncols=3, squeeze=False)
    for (ratios, ranks, coverage), space in zip(panels, names, strict=True):
        for i, (setting, measured) in enumerate(results.items()):
            calibration, color = measured[space], f"C{i}"
            value, low, high = calibration.ratio()
            ends = [[value - low], [high - value]]
            ratios.errorbar(value, i, xerr=ends, fmt="o", color=color, capsize=3)
            histogram = calibration.histogram() / len(calibration["ranks"])
            ranks.step(range(len(histogram)), histogram, where="mid", color=color)
            level, covered, *band = calibration.coverage().values()
            coverage.plot(level, covered, color=color, label=setting)
            coverage.fill_between(level, *band, color=color, alpha=0.15)
        ratios.axvline(1, color="grey", linewidth=0.8)
        ratios.set_yticks(range(len(results)), list(results), fontsize=6)
        ranks.axhline(1 / len(histogram), color="grey", linewidth=0.8)
        coverage.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        style_axes(ratios, f"calibration ratio, {space}", "")
        style_axes(ranks, "rank of the original", "share of images")
        style_axes(coverage, "credible level", "coverage")
    return figure


def main(config: DictConfig) -> None:
    """Measure every setting, write table and figure, and save the best calibrated sampler."""
    settings = {setting.name: setting for setting in find_settings(config)}
    results: dict[str, dict[str, Tensor]] = {}
    for name, setting in settings.items():
        wanted = dependencies(setting.apply(config), setting.checkpoint, "witness")
        results |= harness.measure({name: partial(measure, setting, config)}, wanted, config)
    measured = {name: calibrations(v, config.num_samples) for name, v in results.items()}
    rows = harness.interval_rows(results, {"cosine": "cosine"}, "setting")
    rows = [row | table_row(found) for row, found in zip(rows, measured.values(), strict=True)]
    save_figure(calibration_figure(measured), f"{config.output}/calibration.png")
    best = min(measured, key=lambda name: off(measured[name]))
    if isinstance(load_model(settings[best].checkpoint), FeatInv):
        write_sampler(settings[best], config)
    numbers = {
        name: {"cosine": values["cosine"]} | {k: c.numbers() for k, c in measured[name].items()}
        for name, values in results.items()
    }
    about = (
        f"{len(results[best]['cosine'])} images, {config.num_samples} samples each, seed "
        f"{config.seed}; witness {config.witness}; 95% bootstrap intervals over images. A ratio of "
        "1 is calibrated, below 1 overconfident; p-values are of chi-square tests that the "
        f"original's ranks are flat. Nearest to 1: {best}."
    )
    harness.publish(rows, about, config, numbers)


if __name__ == "__main__":
    run_entry_point(main, "calibration")
