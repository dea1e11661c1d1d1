"""What is lost with depth: one backbone, inverted from early to late layers.

python experiments/depth.py checkpoints=[outputs/depth_runs] data=imagenette data.root=PATH

Takes the models of a sweep over layers, as `train.py -m backbone.layer=blocks.2,blocks.4` makes it.
Each is scored as evaluate.py does it, in a folder of its own below `output`; the same command again
goes on with the models that are not there yet.
"""

import logging
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from experiments.harness import RULE, find_models, pick, publish, reconstruct, score
from featinv import FeatInv
from featinv.backbones import Backbone
from featinv.cli.app import make_batches, run_entry_point, sampler_options
from featinv.evaluation.figures import columns_figure, save_figure, style_axes
from featinv.evaluation.tables import bullets, format_interval
from featinv.utils.devices import pick_device
from featinv.utils.errors import InputError, at_least

log = logging.getLogger("depth")

# Columns of the table: row and metric of metrics.json.
COLUMNS = {
    "spatial cosine": ("reconstruction", "spatial_cosine"),
    "ceiling": ("ceiling", "spatial_cosine"),
    "floor": ("floor", "spatial_cosine"),
    "top-1 agreement": ("reconstruction", "top1_agreement"),
    "PSNR (dB)": ("reconstruction", "psnr"),
    "diversity": ("reconstruction", "diversity"),
}
PANELS = (("spatial cosine", "ceiling", "floor"), ("PSNR (dB)",), ("diversity",))


def by_depth(backbones: dict[str, Backbone]) -> list[str]:
    """Return the names of models, those of early layers first.

    Args:
        backbones: Name of the model -> what it inverts.

    Raises:
        InputError: Several backbones, or several models of a layer.
    """
    kinds = {(backbone.name, backbone.image_size) for backbone in backbones.values()}
    if len(kinds) > 1:
        found = ", ".join(f"{name}: {b.name} at {b.image_size} px" for name, b in backbones.items())
        raise InputError(
            f"The models are of several backbones ({found}): expected one, at several layers."
        )
    layers: dict[str, str] = {}
    for name, backbone in backbones.items():
        if layers.setdefault(backbone.layer, name) != name:
            raise InputError(
                f"'{layers[backbone.layer]}' and '{name}' are both of layer '{backbone.layer}': "
                "expected one model of each layer."
            )
    return sorted(backbones, key=lambda m: backbones[m].layer_names.index(backbones[m].layer))


def table_rows(results: dict[str, dict], backbones: dict[str, Backbone]) -> list[dict[str, str]]:
    """Return the table, as text."""
    rows = []
    for name, metrics in results.items():
        backbone, scores = backbones[name], metrics["rows"]
        cells = {
            title: format_interval(**scores[row][metric])
            for title, (row, metric) in COLUMNS.items()
            if metric in scores.get(row, {})  # a single image has no floor, one sample no diversity
        }
        shape = " x ".join(map(str, backbone.feature_shape))
        rows.append({"layer": backbone.layer, "features": shape, "model": name} | cells)
    return rows


def curves(results: list[dict]) -> Figure:
    """Draw what the table says over the layers, with 95% intervals.

    Args:
        results: Contents of metrics.json, from early to late layers.
    """
    figure = Figure(figsize=(4.5, 5.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    for ax, titles in zip(panels, PANELS, strict=True):
        for title in titles:
            draw_curve(ax, results, title, thin=title in ("ceiling", "floor"))
        style_axes(ax, "", titles[0])
    panels[0].legend(fontsize=7, frameon=False)
    panels[-1].set_xticks(range(len(results)), [metrics["layer"] for metrics in results])
    panels[-1].set_xlabel(f"layer of {results[0]['backbone']}, from early to late", size=8)
    return figure


def draw_curve(ax: Axes, results: list[dict], title: str, thin: bool) -> None:
    """Draw one column of the table; layers without it are left out."""
    row, metric = COLUMNS[title]
    found = [metrics["rows"].get(row, {}).get(metric, {}) for metrics in results]
    mean, low, high = (
        np.array([values.get(key, np.nan) for values in found]) for key in ("mean", "low", "high")
    )
    style = {"color": "gray", "linewidth": 0.7} if thin else {"marker": ".", "linewidth": 1.2}
    label = "reconstruction" if title == "spatial cosine" else title
    dashes = "--" if title == "floor" else "-"
    (line,) = ax.plot(range(len(results)), mean, label=label, linestyle=dashes, **style)
    ax.fill_between(range(len(results)), low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def main(config: DictConfig) -> None:
    """Score every model, then write table, curves and pictures."""
    at_least("num_pictures", config.num_pictures, 1)
    device, output = pick_device(config.device), Path(config.output)
    models = find_models(config.checkpoints)
    backbones = {name: FeatInv.load(checkpoint).backbone for name, checkpoint in models.items()}
    order = by_depth(backbones)
    results: dict[str, dict] = {}
    columns: dict[str, tuple[Tensor, Tensor]] = {}
    how: list[str] = []
    for name in tqdm(order, unit="layer", desc="depth"):
        metrics = score(name, models[name], config, output / name)
        if metrics is None:
            raise InputError(f"'{name}' is a prior, which does not reconstruct: expected others.")
        results[name] = metrics
        model = FeatInv.load(models[name]).to(device)
        batch = pick(make_batches(config, model), config.num_pictures)
        columns[model.backbone.layer] = reconstruct(name, model, batch, config)
        settings = model.settings(**sampler_options(config)).describe()
        how.append(f"{model.backbone.layer}: {model.conditioning} conditioning; {settings}.")
    save_figure(curves(list(results.values())), output / "curves.png")
    backbone = backbones[order[0]]
    title = f"{backbone.name}, from early to late layers: {RULE}; seed {config.seed}"
    pictures = columns_figure(batch["image"], batch["key"], columns, title)
    save_figure(pictures, output / "pictures.png")
    first = results[order[0]]
    about = (
        f"{first['num_images']} images, {first['num_samples']} sample(s) each, seed {config.seed}; "
        "mean over images with 95% bootstrap interval. PSNR is to the original at the model's "
        f"resolution. Backbone {backbone.name}.\n\n{bullets(how)}"
    )
    publish(table_rows(results, backbones), about, config)


if __name__ == "__main__":
    run_entry_point(main, "depth")
