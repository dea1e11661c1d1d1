"""How many bits of an image a layer keeps: by model, by noise level, and where in the image.

python experiments/information.py checkpoints=[RUN,RUN] data=imagenette data.root=PATH

The models are trained ones: of several layers, of spatial and pooled features, or of planted
truths. Bits are estimates; `featinv/analysis/information.py` says what they bound. They must not
rise with depth, as no layer knows more of the image than the one before it.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

import harness
from drawing import draw_samples, in_chunks, load_images, photograph_numbers
from featinv import FeatInv
from featinv.analysis.information import NoiseLevels, bits_kept, denoising_error
from featinv.cli.app import open_model, run_entry_point
from featinv.evaluation.figures import highlight, save_figure
from featinv.evaluation.plots import new_figure, plot_intervals, style_axes
from featinv.metrics import pixel_spread
from featinv.utils.pixels import from_uint8, resize, to_uint8
from harness import Column
from settings import dependencies, each_layer, find_settings

NUMBERS = (
    "bits",
    "bits_by_change",
    "levels",
    "logsnr",
    "epsilon_scaling",
    "agreement",
)  # written as JSON


def measure(model: FeatInv, config: DictConfig) -> dict[str, Tensor]:
    """Estimate the bits of every image, and compare their map with the spread of samples.

    Returns:
        `bits`, `bits_by_change`, (N,), and `maps`, `levels` as in `Information`; `logsnr`, the
        edges of the levels, (K + 1,); `epsilon_scaling`, as given or measured; `original`, uint8;
        and, with samples, `agreement`, (N,), the rank correlation over positions of the bits with
        the pixels' spread there: negative if samples vary where nothing is known.
    """
    batch = load_images(config, model)
    images, indices = from_uint8(batch["image"]), batch["index"].tolist()
    error = config.epsilon_scaling
    if error is None:
        error = denoising_error(model, images[: config.batch_size], config.finest, config.seed)
    levels = (config.num_levels, config.finest)
    found = bits_kept(model, images, *levels, error, config.seed, indices, config.batch_size)
    values = {
        "bits": found.bits,
        "bits_by_change": found.bits_by_change,
        "maps": found.maps,
        "levels": found.levels,
        "logsnr": torch.from_numpy(NoiseLevels(model.diffusion, *levels).logsnr),
        "epsilon_scaling": torch.tensor(error),
        "original": to_uint8(resize(images, model.image_size)),
        "photograph": photograph_numbers(batch),
    }
    if config.num_samples > 1:

        @torch.no_grad()
        def draw(rows: Tensor) -> dict[str, Tensor]:
            features = model.backbone.features(images[rows].to(model.device))
            samples = draw_samples(model, features, batch["index"][rows], config).images
            return {"spread": pixel_spread(samples.unflatten(0, (len(rows), -1))).cpu()}

        spread = in_chunks(batch, config, draw)["spread"]
        values["agreement"] = rank_correlation(found.maps, spread)
    return values


def rank_correlation(maps: Tensor, spread: Tensor) -> Tensor:
    """Return Spearman's correlation over the positions of each image, shape (N,)."""
    spread = F.adaptive_avg_pool2d(spread[:, None], maps.shape[1:])[:, 0]
    return spearman_corrcoef(maps.flatten(1).T, spread.flatten(1).T).reshape(len(maps))


def table_row(values: dict[str, Tensor]) -> dict[str, str]:
    """Return the cells of a model, as text."""
    cells = {"bits": harness.cell(values, "bits", 0)}
    cells["bits by change"] = harness.cell(values, "bits_by_change", 0)
    cells["epsilon scaling"] = f"{float(values['epsilon_scaling']):.3f}"
    if "agreement" in values:
        cells["rank correlation with spread"] = harness.cell(values, "agreement")
    return cells


def curves_figure(results: harness.Results) -> Figure:
    """Draw the bits of each model in the given order, and their density over the noise levels."""
    figure, (left, right) = new_figure(8, 3.2, ncols=2)
    for i, (name, values) in enumerate(results.items()):
        mean, low, high = harness.interval(values["bits"], values.get("photograph")).values()
        left.errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color=f"C{i}", capsize=3)
        edges = values["logsnr"].numpy()
        widths, middles = np.diff(edges), (edges[1:] + edges[:-1]) / 2
        densities = values["levels"].T / torch.from_numpy(widths)[:, None]
        cells = [harness.interval(density, values.get("photograph")) for density in densities]
        plot_intervals(right, middles, cells, color=f"C{i}", label=name)
    left.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
    style_axes(left, "", "bits of an image")
    style_axes(right, "log signal-to-noise ratio", "bits for each unit of it")
    right.legend(fontsize=6, frameon=False)
    return figure


def map_column(name: str, values: dict[str, Tensor]) -> Column:
    """Return where a model keeps bits of each image: there the original keeps its colours.

    A map is averaged over 3x3 positions, as single ones hold more noise than bits; its largest
    twentieth is lit in full.
    """
    heats = F.avg_pool2d(values["maps"][:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    pairs = zip(values["original"], heats, strict=False)
    lit = [highlight(picture, heat, float(heat.quantile(0.95))) for picture, heat in pairs]
    return Column(name, lit, [f"{float(bits):.0f} bits" for bits in values["bits"]])


def main(config: DictConfig) -> None:
    """Measure every model, write table and figures."""
    results, rows = {}, []
    for setting in each_layer(find_settings(config), config.layer):
        name, own = setting.name, setting.apply(config)
        model = open_model(setting.checkpoint, own)
        wanted = dependencies(own, setting.checkpoint, "num_levels", "finest", "epsilon_scaling")
        results |= harness.measure({name: partial(measure, model, own)}, wanted, own)
        about = {"backbone": model.backbone.name, "layer": model.backbone.layer}
        about["features"] = model.conditioning
        rows.append({"model": name} | about | table_row(results[name]))
    save_figure(curves_figure(results), f"{config.output}/bits.png")
    first = next(iter(results.values()))
    maps = [map_column(name, values) for name, values in results.items()]
    columns = [Column("original", first["original"]), *maps]
    harness.save_pictures(columns, f"{config.output}/maps.png")
    text = (
        f"{len(first['bits'])} images, {config.num_levels} noise levels each, seed {config.seed}; "
        f"bits about the latents seen through noise of {config.finest:g} and more; mean over "
        "images with 95% bootstrap interval over photographs. Estimates: bounds for optimal "
        "denoisers only."
    )
    numbers = {
        name: {key: values[key] for key in NUMBERS if key in values}
        for name, values in results.items()
    }
    harness.publish(rows, text, config, numbers)


if __name__ == "__main__":
    run_entry_point(main, "information")
