"""Are samples as different as they should be? Calibration of a model over settings of its sampler.

python experiments/calibration.py checkpoint=RUN data=imagenette data.root=PATH

Ratios of 1 are honest, below 1 overconfident, above 1 too wild (featinv/analysis/calibration.py),
in several spaces: the picture, its 8x8 blocks' mean colours, the model's latents, and the features
of a classifier that took no part. The cosine beside them says which settings are only pretty. The
original counts as it is, so in pixels a codec's loss makes samples look overconfident; in the
latents it does not.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv.analysis.calibration import Calibration, other_images
from featinv.backbones import Backbone
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import save_figure, style_axes
from featinv.evaluation.plots import new_figure
from featinv.evaluation.set_metrics import extractor_backbone
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval
from featinv.models.base import Inverter
from featinv.utils.devices import pick_device
from featinv.utils.errors import at_least
from featinv.utils.pixels import eight_bit, from_uint8, resize
from settings import find_settings, open_setting

log = logging.getLogger("calibration")

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
def measure(
    model: Inverter, batches: list[dict], witness: Backbone | None, config: DictConfig
) -> tuple[dict[str, Calibration], Tensor]:
    """Draw samples of every image; return the calibration in each space, and cosines, (N,)."""
    whole = from_uint8(torch.cat([batch["image"] for batch in batches]))
    indices = torch.cat([batch["index"] for batch in batches])
    others = other_images(torch.cat([batch["label"] for batch in batches]).tolist())
    originals = eight_bit(resize(whole, model.image_size))
    measured = {name: Calibration(config.num_samples) for name in spaces(model, witness)}
    cosines = []
    for rows in tqdm(torch.arange(len(whole)).split(8), unit="batch", desc="samples", leave=False):
        features = model.backbone.features(whole[rows].to(model.device))
        draws = harness.draw_samples(model, features, indices[rows], config)
        shape = (len(rows), config.num_samples)
        cosines.append(draws.cosine(features))
        for name, space in spaces(model, witness).items():
            pictures = (originals[rows], originals[[others[int(i)] for i in rows]])
            points, references = (space(picture.to(model.device)) for picture in pictures)
            measured[name].update(space(draws.images).unflatten(0, shape), points, references)
    return measured, torch.cat(cosines)


def table_row(measured: dict[str, Calibration], cosines: Tensor) -> dict[str, str]:
    """Return the cells of a setting, as text."""
    cells = {"cosine": format_interval(float(cosines.mean()), *bootstrap_interval(cosines))}
    for name, calibration in measured.items():
        cells[f"ratio, {name}"] = format_interval(*calibration.ratio())
    first = next(iter(measured.values()))
    cells["flat ranks, pixels: p"] = f"{first.p_value():.2g}"
    cells["coverage, pixels: p"] = f"{first.p_value('reference_ranks'):.2g}"
    return cells


def figure(results: dict[str, dict[str, Calibration]]) -> Figure:
    """Draw ratios, rank histograms and coverage of every setting, each space in a row."""
    names = list(next(iter(results.values())))
    figure, grid = new_figure(9, 2.6 * len(names), rows=len(names), ncols=3, squeeze=False)
    for axes, space in zip(grid, names, strict=True):
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
    """Measure every setting, write table and figure."""
    at_least("num_samples", config.num_samples, 2)
    witness = None
    if config.witness is not None:
        witness = extractor_backbone(config.witness, "witness").to(pick_device(config.device))
    rows, results, numbers = [], {}, {}
    for setting in find_settings(config):
        model, own, _ = open_setting(setting, config)
        name, batches = setting.name, list(make_batches(own, model))
        results[name], cosines = measure(model, batches, witness, own)
        rows.append({"setting": name} | table_row(results[name], cosines))
        log.info("%s", rows[-1])
        keys = ("between", "to_original", "ranks", "reference_ranks")
        numbers[name] = {s: {k: c[k] for k in keys} for s, c in results[name].items()}
    output = Path(config.output)
    save_figure(figure(results), output / "calibration.png")
    save_numbers(numbers, output / "results.json")
    about = (
        f"{len(cosines)} images, {config.num_samples} samples each, seed {config.seed}; witness "
        f"{config.witness}; 95% bootstrap intervals over images. A ratio of 1 is calibrated, "
        "below 1 overconfident; p-values of chi-square tests that the original's ranks are flat."
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "calibration")
