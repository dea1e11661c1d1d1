"""Figures of training curves."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from featinv.evaluation.figures import style_axes


def curves_figure(history: Mapping[str, Sequence[tuple[int, float]]], title: str = "") -> Figure:
    """Draw training curves in two panels, losses and feature cosines.

    Args:
        history: Series name -> (optimiser step, value) pairs. A name with `loss` in it goes to
            the left, one with `cosine` to the right, others are not drawn. A long series is
            drawn faintly, below its running mean.
        title: Written above both panels.
    """
    figure = Figure(figsize=(7, 2.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, size=9, parse_math=False)
    for ax, kind in zip(figure.subplots(1, 2), ("loss", "cosine"), strict=True):
        for name, series in history.items():
            if kind in name and series:
                _draw_curve(ax, name, *np.asarray(sorted(series), dtype=np.float64).T)
        style_axes(ax, "optimiser step", "feature cosine" if kind == "cosine" else kind)
        if ax.lines:
            ax.legend(fontsize=7, frameon=False)
    return figure


def comparison_figure(
    histories: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], names: Sequence[str]
) -> Figure:
    """Draw the curves of several runs over each other, one panel for each name.

    Args:
        histories: Run -> series name -> (optimiser step, value) pairs; a run may lack a series.
        names: The series to draw, as for `curves_figure`.
    """
    columns = 1 if max(map(len, histories), default=0) > 40 else 3
    legend_inches = 0.16 * math.ceil(len(histories) / columns)
    figure = Figure(figsize=(3.2 * len(names), 2.4 + legend_inches), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    palette = matplotlib.colormaps["tab10" if len(histories) <= 10 else "turbo"]
    # a palette of ten is taken by numbers, a continuous one evenly
    colours = range(10) if len(histories) <= 10 else np.linspace(0, 1, len(histories))
    colours = {run: palette(colour) for run, colour in zip(histories, colours, strict=False)}
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for run, history in histories.items():
            if history.get(name):
                steps, values = np.asarray(sorted(history[name]), dtype=np.float64).T
                _draw_curve(ax, run, steps, values, colours[run])
        style_axes(ax, "optimiser step", name)
    lines = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    figure.legend(
        handles=lines, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )
    return figure


def _draw_curve(
    ax: Axes, name: str, steps: np.ndarray, values: np.ndarray, color: object = None
) -> None:
    """Draw one series: few points as dots, many as their running mean over the points."""
    if len(steps) <= 50:
        ax.plot(steps, values, marker=".", linewidth=1, markersize=4, label=name, color=color)
        return
    window = np.ones(len(steps) // 25)
    smooth = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    (line,) = ax.plot(steps, smooth, linewidth=1.2, label=name, color=color)
    ax.plot(steps, values, linewidth=0.5, alpha=0.25, color=line.get_color(), zorder=1)
