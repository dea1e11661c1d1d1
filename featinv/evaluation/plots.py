"""Plots in a common style: means with their intervals, training curves."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

History = Mapping[str, Sequence[tuple[int, float]]]  # series -> (optimiser step, value) pairs


def new_figure(width: float, height: float, rows: int = 1, **grid: object) -> tuple[Figure, Axes]:
    """Return a figure of width x height inches, and its axes as from `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    return figure, figure.subplots(rows, **grid)


def style_axes(ax: Axes, x: str, y: str) -> None:
    """Label the axes of a panel in the common style: a light grid and no box."""
    ax.set_xlabel(x, size=8)
    ax.set_ylabel(y, size=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)


def plot_intervals(
    ax: Axes, x: Sequence[float], cells: Sequence[Mapping[str, float]], **style: object
) -> None:
    """Plot means as a line and their intervals as a band around it.

    Args:
        ax: The axes.
        x: One value per point.
        cells: `mean`, `low` and `high` of each point; an empty cell leaves a gap.
        **style: Options of `Axes.plot`.
    """
    mean, low, high = (
        [cell.get(key, float("nan")) for cell in cells] for key in ("mean", "low", "high")
    )
    (line,) = ax.plot(x, mean, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def curves_figure(history: History, title: str = "") -> Figure:
    """Plot the losses and feature cosines of a run in two panels.

    Args:
        history: Series with `loss` in their name go to the left panel, those with `cosine` to the
            right one; others are left out.
        title: Title of the figure.
    """
    figure, panels = new_figure(7, 2.6, 1, ncols=2)
    figure.suptitle(title, size=9, parse_math=False)
    for ax, kind in zip(panels, ("loss", "cosine"), strict=True):
        for name, series in history.items():
            if kind in name and series:
                _draw_curve(ax, name, series)
        style_axes(ax, "optimiser step", "feature cosine" if kind == "cosine" else kind)
        if ax.lines:
            ax.legend(fontsize=7, frameon=False)
    return figure


def comparison_figure(histories: Mapping[str, History], names: Sequence[str]) -> Figure:
    """Plot the curves of several runs together, one panel per series.

    Args:
        histories: Run -> its history, which may lack some series.
        names: The series to plot.
    """
    columns = 1 if max(map(len, histories), default=0) > 40 else 3
    legend_inches = 0.16 * math.ceil(len(histories) / columns)
    size = (3.2 * len(names), 2.4 + legend_inches)
    figure, panels = new_figure(*size, 1, ncols=len(names), squeeze=False)
    if len(histories) <= 10:
        palette = matplotlib.colormaps["tab10"].colors
    else:
        palette = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(histories)))
    colours = dict(zip(histories, palette, strict=False))
    for ax, name in zip(panels[0], names, strict=True):
        for run, history in histories.items():
            if history.get(name):
                _draw_curve(ax, run, history[name], colours[run])
        style_axes(ax, "optimiser step", name)
    lines = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    figure.legend(
        handles=lines, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )
    return figure


def _draw_curve(
    ax: Axes, name: str, series: Sequence[tuple[int, float]], color: object = None
) -> None:
    """Plot a series: up to 50 points as they are, more as a running mean over faint raw values."""
    values = pd.Series(dict(sorted(series)), dtype=float)
    if len(values) <= 50:
        ax.plot(values, marker=".", linewidth=1, markersize=4, label=name, color=color)
        return
    smooth = values.rolling(len(values) // 25, center=True, min_periods=1).mean()
    (line,) = ax.plot(smooth, linewidth=1.2, label=name, color=color)
    ax.plot(values, linewidth=0.5, alpha=0.25, color=line.get_color(), zorder=1)
