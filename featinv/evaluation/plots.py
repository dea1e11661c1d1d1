"""Plots in a common style, and means with their intervals."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width: float, height: float, rows: int = 1, **grid: object) -> tuple[Figure, Axes]:
    """Return a figure of width x height inches, and its axes as from `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
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
