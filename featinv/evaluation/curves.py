"""Figures of training curves."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from featinv.evaluation.figures import style_axes
from featinv.evaluation.plots import new_figure

History = Mapping[str, Sequence[tuple[int, float]]]  # series -> (optimiser step, value) pairs


def curves_figure(history: History, title: str = "") -> Figure:
    """Draw training curves in two panels, losses and feature cosines.

    Args:
        history: A series with `loss` in its name goes to the left, one with `cosine` to the right,
            others are not drawn. A long series is drawn faintly, below its running mean.
        title: Written above both panels.
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
    """Draw the curves of several runs over each other, one panel for each name.

    Args:
        histories: Run -> its series; a run may lack one.
        names: The series to draw.
    """
    columns = 1 if max(map(len, histories), default=0) > 40 else 3
    legend_inches = 0.16 * math.ceil(len(histories) / columns)
    size = (3.2 * len(names), 2.4 + legend_inches)
    figure, panels = new_figure(*size, 1, ncols=len(names), squeeze=False)
    palette = matplotlib.colormaps["tab10" if len(histories) <= 10 else "turbo"]
    # a palette of ten is taken by numbers, a continuous one evenly
    colours = range(10) if len(histories) <= 10 else np.linspace(0, 1, len(histories))
    colours = {run: palette(colour) for run, colour in zip(histories, colours, strict=False)}
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
    """Draw one series: few points as dots, many as their running mean over the points."""
    values = pd.Series(dict(sorted(series)), dtype=float)
    if len(values) <= 50:
        ax.plot(values, marker=".", linewidth=1, markersize=4, label=name, color=color)
        return
    smooth = values.rolling(len(values) // 25, center=True, min_periods=1).mean()
    (line,) = ax.plot(smooth, linewidth=1.2, label=name, color=color)
    ax.plot(values, linewidth=0.5, alpha=0.25, color=line.get_color(), zorder=1)
