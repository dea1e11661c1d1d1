"""How many bits of an image a layer keeps: by model, by noise level, and where in the image.

python experiments/information.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

The models are trained ones of several layers, of spatial and pooled features, or of planted truths.
Bits are estimates: see featinv/analysis/information.py for what they bound. Over depth they must
not rise, as no layer knows more of the image than the one before it.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import Tensor

import harness
from featinv import FeatInv
from featinv.analysis.information import NoiseLevels, bits_kept, error_at
from featinv.cli.app import run_entry_point
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure, style_axes
from featinv.evaluation.plots import new_figure
from featinv.evaluation.tables import format_interval
from featinv.metrics import bootstrap_interval, pixel_spread
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import dependencies, find_models, open_model


def measure(model: FeatInv, config: DictConfig) -> dict[str, Tensor]:
    """Estimate the bits of every image, and compare their map with the spread of samples.

    Returns:
        `bits`, `changes`, (N,), and `maps`, `levels` as in `Information`; `logsnr`, the ends of the
        levels, (K + 1,); `network_error`, the one that was taken; `original`, uint8; and with
        samples `agreement`, (N,), the rank correlation over positions of the bits with the spread
        of the pixels there, which is negative where samples vary where nothing is known.
    """
    batch = harness.load_images(config, model)
    images, indices = from_uint8(batch["image"]), batch["index"].tolist()
    error = config.network_error
    if error is None:
        error = error_at(model, images[: config.batch_size], config.finest, config.seed)
    levels = (config.num_levels, config.finest)
    found = bits_kept(model, images, *levels, error, config.seed, indices, config.batch_size)
    values = {
        "bits": found.bits,
        "changes": found.changes,
        "maps": found.maps,
        "levels": found.levels,
        "logsnr": torch.from_numpy(NoiseLevels(model.diffusion, *levels).logsnr),
        "network_error": torch.tensor(error),
        "original": to_uint8(resize(images, model.image_size)),
    }
    if config.num_samples > 1:

        @torch.no_grad()
        def spread(rows: Tensor) -> dict[str, Tensor]:
            features = model.backbone.features(images[rows].to(model.device))
            draws = harness.draw_samples(model, features, batch["index"][rows], config)
            return {"spread": pixel_spread(draws.images.unflatten(0, (len(rows), -1))).cpu()}

        spreads = harness.in_chunks(len(images), config, spread)["spread"]
        values["agreement"] = rank_correlation(found.maps, spreads)
    return values


def rank_correlation(maps: Tensor, spread: Tensor) -> Tensor:
    """Return Spearman's correlation over the positions of each image, shape (N,)."""
    spread = F.adaptive_avg_pool2d(spread[:, None], maps.shape[1:])[:, 0]
    pairs = zip(maps.flatten(1).numpy(), spread.flatten(1).numpy(), strict=True)
    return torch.tensor([float(spearmanr(a, b).statistic) for a, b in pairs])


def table_row(values: dict[str, Tensor]) -> dict[str, str]:
    """Return the cells of a model, as text."""

    def cell(key: str, digits: int) -> str:
        return format_interval(**harness.interval(values[key]), digits=digits)

    cells = {"bits": cell("bits", 0), "bits by changes": cell("changes", 0)}
    cells["network's error"] = f"{float(values['network_error']):.3f}"
    if "agreement" in values:
        cells["rank correlation with spread"] = cell("agreement", 3)
    return cells


def curves_figure(results: dict[str, dict]) -> Figure:
    """Draw the bits of each model in the order given, and how they lie over the noise levels."""
    figure, (left, right) = new_figure(8, 3.2, ncols=2)
    for i, (name, values) in enumerate(results.items()):
        mean = float(values["bits"].mean())
        low, high = bootstrap_interval(values["bits"])
        left.errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color=f"C{i}", capsize=3)
        ends = values["logsnr"].numpy()
        widths = np.diff(ends)
        density = values["levels"].mean(0).numpy() / widths
        intervals = np.array([bootstrap_interval(level) for level in values["levels"].T])
        middles = (ends[1:] + ends[:-1]) / 2
        right.plot(middles, density, color=f"C{i}", label=name)
        right.fill_between(
            middles, *(intervals / widths[:, None]).T, color=f"C{i}", alpha=0.2, linewidth=0
        )
    left.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
    style_axes(left, "", "bits of an image")
    style_axes(right, "log signal-to-noise ratio", "bits for each unit of it")
    right.legend(fontsize=6, frameon=False)
    return figure


def maps_figure(results: dict[str, dict], number: int) -> Figure:
    """Draw originals, and beside each where every model keeps bits: there it has its colours.

    A map is a mean over 3x3 positions, as single ones hold more noise than bits; the largest
    twentieth of it is lit in full.
    """
    pictures, captions = [], []
    for i, original in enumerate(next(iter(results.values()))["original"][:number]):
        maps = torch.stack([values["maps"][i] for values in results.values()])[:, None]
        heats = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)[:, 0]
        lit = (heat_over(original, heat, float(heat.quantile(0.95))) for heat in heats)
        pictures.append([original, *lit])
        captions.append(["", *(f"{float(v['bits'][i]):.0f} bits" for v in results.values())])
    return gallery_figure(pictures, columns=["original", *results], captions=captions)


def main(config: DictConfig) -> None:
    """Measure every model, write table and figures."""
    results, rows = {}, []
    for name, checkpoint in find_models(config.checkpoints).items():
        model = open_model(checkpoint, config)
        wanted = dependencies(config, checkpoint, "num_levels", "finest", "network_error")
        results |= harness.measure({name: partial(measure, model, config)}, wanted, config)
        about = {"backbone": model.backbone.name, "layer": model.backbone.layer}
        about["features"] = model.conditioning
        rows.append({"model": name} | about | table_row(results[name]))
    output = Path(config.output)
    save_figure(curves_figure(results), output / "bits.png")
    save_figure(maps_figure(results, config.num_pictures), output / "maps.png")
    keys = ("bits", "changes", "levels", "logsnr", "network_error", "agreement")
    numbers = {
        name: {k: values[k] for k in keys if k in values} for name, values in results.items()
    }
    number = len(next(iter(results.values()))["bits"])
    text = (
        f"{number} images, {config.num_levels} noise levels each, seed {config.seed}; bits about "
        f"the latents seen through noise of {config.finest:g} and more; mean over images with 95% "
        "bootstrap interval. Estimates: bounds for optimal denoisers only."
    )
    harness.publish_measured(rows, numbers, text, config)


if __name__ == "__main__":
    run_entry_point(main, "information")
