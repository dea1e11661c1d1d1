"""Reconstructions against values of the sampler: schedulers, steps, guidance, or any other.

python experiments/sampler_grid.py checkpoints=[RUN] data=imagenette data.root=PATH \
    'grid={num_steps: [50,20,10,5], scheduler: [ddim,dpm_solver]}'
python experiments/sampler_grid.py checkpoints=[outputs/dropout] data=imagenette data.root=PATH \
    data.val_shards=imagenette-train-0007.tar 'grid={guidance_scale: [1,1.75,3]}'

Every model is drawn from with every combination, on the same images and noise, so that rows compare
image by image; the first value is the x axis of the figure. The second command takes the models of
a sweep, `train.py -m experiment=small model.cond_drop_prob=0,0.1,0.3`. To choose values by the
table, use held-out images of the train split. The same command continues with what is missing.
"""

from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig

import harness
from featinv.cli.app import open_model, run_entry_point, sampler_options
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import new_figure, plot_intervals, style_axes
from featinv.evaluation.report import headline
from featinv.evaluation.tables import format_interval
from featinv.utils.errors import InputError
from settings import Setting, find_models

Point = tuple  # name of a model, and a value for each key of the grid


def check_grid(config: DictConfig) -> None:
    """Raise an `InputError` if the grid does not list values of the sampler."""
    if not isinstance(config.grid, DictConfig) or not config.grid:
        raise InputError(f"grid is '{config.grid}', expected for example {{num_steps: [20,50]}}.")
    for name, values in config.grid.items():
        if not isinstance(values, ListConfig) or not values:
            raise InputError(f"grid.{name} is {values}, expected a list, for example [1,3].")
        if (value := config.sampler[name]) is not None:
            raise InputError(f"sampler.{name} is {value}, but grid.{name} lists its values.")


def find_points(config: DictConfig) -> tuple[dict[Point, Setting], dict[str, float]]:
    """Return all combinations of models and values, and the models' conditioning dropout."""
    points, dropout = {}, {}
    for name, checkpoint in find_models(config.checkpoints).items():
        model = open_model(checkpoint, config)
        for values in product(*config.grid.values()):
            sampler = dict(zip(config.grid, values, strict=True))
            setting = Setting(" ".join(map(str, (name, *values))), checkpoint, sampler)
            model.settings(**sampler_options(setting.apply(config)))  # raises before any drawing
            points[name, *values] = setting
        dropout[name] = model.cond_drop_prob
    return points, dropout


def cosine_figure(results: dict[Point, dict], axis: str) -> Figure:
    """Draw cosine against the grid's first value, a line for each other combination, 95% bands."""
    figure, ax = new_figure(4, 2.8)
    ticks = list(dict.fromkeys(point[1] for point in results))
    for line in dict.fromkeys((name, *rest) for name, _, *rest in results):
        found = [results[line[0], tick, *line[1:]] for tick in ticks]
        cells = [metrics["rows"]["reconstruction"]["spatial_cosine"] for metrics in found]
        plot_intervals(ax, range(len(ticks)), cells, marker=".", label=" ".join(map(str, line)))
    ax.set_xticks(range(len(ticks)), map(str, ticks))
    style_axes(ax, axis, "spatial feature cosine")
    ax.legend(fontsize=6, frameon=False)
    return figure


def main(config: DictConfig) -> None:
    """Score every combination, write table and figure."""
    check_grid(config)
    points, dropout = find_points(config)
    scored = harness.score_all(list(points.values()), config)
    results = {point: scored[setting.name] for point, setting in points.items()}
    rows, first = [], None
    for point, metrics in results.items():
        folder = Path(config.output, harness.file_name(points[point].name))
        scores = pd.read_csv(folder / "per_image.csv")
        cosine = torch.tensor(scores["reconstruction/spatial_cosine"].to_numpy())
        first = cosine if first is None else first
        difference = harness.interval(cosine - first, scores["photograph"].tolist())
        cells = dict(zip(("model", *config.grid), map(str, point), strict=True))
        cells |= {"dropout": f"{dropout[point[0]]:g}"} | headline(metrics)
        cells["cosine - first row's"] = format_interval(**difference)
        rows.append(cells | {"s per image": f"{metrics['seconds_per_reconstruction']:.3f}"})
    axis = next(iter(config.grid))
    save_figure(cosine_figure(results, axis), f"{config.output}/cosine.png")
    about = f"{harness.scored_caption(metrics)} {harness.layers_caption(scored)}"
    harness.publish(rows, about, config)


if __name__ == "__main__":
    run_entry_point(main, "sampler_grid")
