"""How many bits of an image a layer keeps: by model, by noise level, and where in the image.

python experiments/information.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

The models are trained ones of several layers, of spatial and pooled features, or of planted truths.
Bits are estimates: see featinv/analysis/information.py for what they bound. Over depth they must
not rise, as no layer knows more of the image than the one before it.
"""

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

import harness
from featinv import FeatInv
from featinv.analysis.information import Information, NoiseLevels, bits_kept, error_at
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import gallery_figure, heat_over, save_figure, style_axes
from featinv.evaluation.tables import format_interval, save_numbers
from featinv.metrics import bootstrap_interval, pixel_spread
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8, resize, to_uint8
from settings import find_models, open_model

log = logging.getLogger("information")


def measure(model: FeatInv, batches: list[dict], config: DictConfig) -> dict[str, Tensor]:
    """Estimate the bits of every image, and compare their map with the spread of samples.

    Returns:
        `bits`, `changes`, (N,), and `maps`, `levels` as in `Information`; `logsnr`, the ends of the
        levels, (K + 1,); `network_error`, the one that was taken; `original`, uint8; and with
        samples `agreement`, (N,), the rank correlation over positions of the bits with the spread
        of the pixels there, which is negative where samples vary where nothing is known.
    """
    parts, originals, spreads = [], [], []
    error = config.network_error
    if error is None:
        error = error_at(model, from_uint8(batches[0]["image"]), config.finest, config.seed)
    for batch in tqdm(batches, unit="batch", desc="bits", leave=False):
        images = from_uint8(batch["image"].to(model.device))
        parts.append(
            bits_kept(
                model,
                images,
                config.num_levels,
                config.finest,
                error,
                config.seed,
                batch["index"].tolist(),
                config.batch_size,
            )
        )
        originals.append(to_uint8(resize(images, model.image_size)).cpu())
        if config.num_samples > 1:
            with torch.no_grad():
                features = model.backbone.features(images)
            draws = harness.draw_samples(model, features, batch["index"], config)
            samples = draws.images.unflatten(0, (len(images), config.num_samples))
            spreads.append(pixel_spread(samples).cpu())
    found = Information.join(parts)
    levels = NoiseLevels(model.diffusion, config.num_levels, config.finest)
    values = {
        "bits": found.bits,
        "changes": found.changes,
        "maps": found.maps,
        "levels": found.levels,
        "logsnr": torch.from_numpy(levels.logsnr),
        "network_error": torch.tensor(error),
        "original": torch.cat(originals),
    }
    if spreads:
        values["agreement"] = rank_correlation(found.maps, torch.cat(spreads))
    return values


def rank_correlation(maps: Tensor, spread: Tensor) -> Tensor:
    """Return Spearman's correlation over the positions of each image, shape (N,)."""
    spread = F.adaptive_avg_pool2d(spread[:, None], maps.shape[1:])[:, 0]
    pairs = zip(maps.flatten(1).numpy(), spread.flatten(1).numpy(), strict=True)
    return torch.tensor([float(spearmanr(a, b).statistic) for a, b in pairs])


def table_rows(results: dict[str, dict], about: dict[str, dict]) -> list[dict[str, str]]:
    """Return the table, as text."""
    titles = {"bits": "bits", "changes": "bits by changes"}
    rows = []
    for name, values in results.items():
        cells = {
            title: format_interval(
                float(values[key].mean()), *bootstrap_interval(values[key]), digits=0
            )
            for key, title in titles.items()
        }
        cells["network's error"] = f"{float(values['network_error']):.3f}"
        if "agreement" in values:
            cells["rank correlation with spread"] = format_interval(
                float(values["agreement"].mean()), *bootstrap_interval(values["agreement"])
            )
        rows.append({"model": name} | about[name] | cells)
    return rows


def curves_figure(results: dict[str, dict]) -> Figure:
    """Draw the bits of each model in the order given, and how they lie over the noise levels."""
    figure = Figure(figsize=(8, 3.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
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
    """Draw originals, and beside each where every model keeps bits: there it has its colours."""
    originals = next(iter(results.values()))["original"][:number]
    pictures = []
    for i, original in enumerate(originals):
        heats = [values["maps"][i] for values in results.values()]
        pictures.append(
            [original, *(heat_over(original, heat, float(heat.max())) for heat in heats)]
        )
    return gallery_figure(pictures, columns=["original", *results])


def main(config: DictConfig) -> None:
    """Measure every model, write table and figures."""
    results, about = {}, {}
    for name, checkpoint in tqdm(find_models(config.checkpoints).items(), unit="model"):
        model = open_model(checkpoint, config)
        batches = list(make_batches(config, model))
        if not batches:
            raise InputError("There is no image to measure: the data set is empty.")
        results[name] = measure(model, batches, config)
        about[name] = {
            "backbone": model.backbone.name,
            "layer": model.backbone.layer,
            "features": model.conditioning,
        }
    output = Path(config.output)
    save_figure(curves_figure(results), output / "bits.png")
    save_figure(maps_figure(results, config.num_pictures), output / "maps.png")
    keys = ("bits", "changes", "levels", "logsnr", "network_error", "agreement")
    save_numbers(
        {name: {k: values[k] for k in keys if k in values} for name, values in results.items()},
        output / "results.json",
    )
    number = len(next(iter(results.values()))["bits"])
    text = (
        f"{number} images, {config.num_levels} noise levels each, seed {config.seed}; bits about "
        f"the latents seen through noise of {config.finest:g} and more; mean over images with 95% "
        "bootstrap interval. Estimates: bounds for optimal denoisers only."
    )
    harness.publish(table_rows(results, about), text, config)


if __name__ == "__main__":
    run_entry_point(main, "information")
