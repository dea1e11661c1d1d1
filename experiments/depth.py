"""What is lost with depth: one backbone, inverted from early to late layers.

python experiments/depth.py checkpoints=[outputs/depth_runs] data=imagenette data.root=PATH

Takes a model of several layers, as made by `train.py backbone.layer=[blocks.2,blocks.4]`, or models
of one layer each. Each layer is scored as by evaluate.py, in a folder of its own below `output`;
the same command continues with those that are missing.
"""

from matplotlib.figure import Figure
from omegaconf import DictConfig

import harness
from drawing import FIRST_OF_EACH_CLASS, first_of_each_class, reconstruct
from featinv.checkpoints import load_model
from featinv.cli.app import make_batches, run_entry_point
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import new_figure, plot_intervals, style_axes
from featinv.evaluation.report import headline
from featinv.evaluation.tables import bullets, format_interval
from featinv.utils.errors import unknown
from settings import Setting, each_layer, find_settings, open_setting

# Lines of the figure: row and metric of metrics.json; the columns that the headline lacks.
LINES = {
    "spatial cosine": ("reconstruction", "spatial_cosine"),
    "ceiling": ("ceiling", "spatial_cosine"),
    "floor": ("floor", "spatial_cosine"),
    "PSNR (dB)": ("reconstruction", "psnr"),
    "diversity": ("reconstruction", "diversity"),
}
COLUMNS = ("ceiling", "floor")
PANELS = (("spatial cosine", "ceiling", "floor"), ("PSNR (dB)",), ("diversity",))
GREY = {"color": "gray", "linewidth": 0.7}
STYLES = {"ceiling": GREY, "floor": GREY | {"linestyle": "--"}}


def find_layers(settings: list[Setting]) -> list[Setting]:
    """Return a setting for each layer of the models, early layers first.

    Raises:
        InputError: A layer is none of the first model's backbone.
    """
    backbone, settings = load_model(settings[0].checkpoint).backbone, each_layer(settings)
    for setting in settings:
        if setting.layer not in backbone.layer_names:
            raise unknown(
                f"layer of backbone '{backbone.name}'", setting.layer, backbone.layer_names
            )
    return sorted(settings, key=lambda setting: backbone.layer_names.index(setting.layer))


def scores(metrics: dict, title: str) -> dict[str, float]:
    """Return a line's mean and interval; empty without it, like the diversity of one sample."""
    row, metric = LINES[title]
    return metrics["rows"].get(row, {}).get(metric, {})


def depth_figure(results: dict[str, dict]) -> Figure:
    """Draw the scores over the layers, from early to late, with 95% intervals."""
    figure, panels = new_figure(4.5, 5.2, rows=3, sharex=True, height_ratios=[2, 1, 1])
    for ax, titles in zip(panels, PANELS, strict=True):
        for title in titles:
            style = STYLES.get(title, {"marker": ".", "linewidth": 1.2})
            cells = [scores(metrics, title) for metrics in results.values()]
            plot_intervals(ax, range(len(results)), cells, label=title, **style)
        style_axes(ax, "", titles[0])
    panels[0].legend(fontsize=7, frameon=False)
    panels[-1].set_xticks(range(len(results)), list(results))
    panels[-1].set_xlabel("from early to late layers", size=8)
    return figure


def main(config: DictConfig) -> None:
    """Score every layer, write table, curves and pictures."""
    settings = find_layers(find_settings(config))
    results = harness.score_all(settings, config)
    columns, rows, captions = {}, [], []
    for setting in settings:
        model, model_config, sampling = open_setting(setting, config)
        name, layer, metrics = setting.name, model.backbone.layer, results[setting.name]
        batch = first_of_each_class(make_batches(model_config, model), config.num_pictures)
        columns[name] = reconstruct(model, batch, model_config)
        captions.append(f"{name}: {setting.checkpoint}, {model.conditioning}; {sampling}.")
        cells = {} if name == layer else {"model": name}
        cells |= {"layer": layer, "features": " x ".join(map(str, model.backbone.feature_shape))}
        bounds = {title: scores(metrics, title) for title in COLUMNS}
        bounds = {title: format_interval(**cell) for title, cell in bounds.items() if cell}
        rows.append(cells | headline(metrics) | bounds)
    save_figure(depth_figure(results), f"{config.output}/curves.png")
    name = ", ".join(dict.fromkeys(metrics["backbone"] for metrics in results.values()))
    title = f"{name}, from early to late layers: {FIRST_OF_EACH_CLASS}; seed {config.seed}"
    pictures = harness.beside_originals(batch["image"], columns)
    harness.save_pictures(pictures, f"{config.output}/pictures.png", title, batch["key"])
    about = (
        f"{harness.scored_caption(metrics)} PSNR is to the original at the model's resolution. "
        f"Backbone {name}.\n\n{bullets(captions)}"
    )
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "depth")
