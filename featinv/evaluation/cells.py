"""Lay out a figure as a grid of pictures in cells of whole pixels, with text around them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path

CELL_PIXELS = 256  # target for the longer side of a cell
CELL_INCHES = 1.2  # six columns fill the text width of a page
FONT_POINTS = 7
LINE_POINTS = 9


@dataclass
class Cells:
    """The cells of a figure; lengths are in pixels."""

    figure: Figure
    axes: list[list[Axes]]  # row by row
    point: float  # 1/72 inch
    top: int  # upper edge to first row
    right: int  # left edge to end of last column
    pitch: int  # one row to the next


def make_cells(
    size: tuple[int, int],
    columns: Sequence[int],
    left: Sequence[str] = (),
    above: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
    title: str = "",
    margin_points: float = 0,
) -> Cells:
    """Return a figure with empty cells and the text around them.

    Args:
        size: Height and width of a cell in pixels.
        columns: Number of cells in each row.
        left: One text per row, or empty.
        above: One text per column, or empty.
        below: At most one text per cell, row by row, or empty.
        title: Title of the figure.
        margin_points: Space to leave at the right edge, in points.
    """
    height, width = size
    dpi = max(size) / CELL_INCHES
    point, gap = dpi / 72, round(dpi / 30)
    left = [_wrap(text, 24) for text in left]
    above = [_wrap(text.replace("_", " "), 20) for text in above]  # so that lines break at words
    head_lines = max((text.count("\n") + 1 for text in above), default=0)

    x = gap + (round(max(map(_text_points, left)) * point) + 2 * gap if left else 0)
    right = x + max(columns) * (width + gap)
    figure_width = right + round(margin_points * point)
    title = _wrap(title, max(20, int(figure_width / point / 5.5)))
    title_lines = len(title.splitlines())
    top = round((6 + LINE_POINTS * head_lines + (LINE_POINTS + 4) * title_lines) * point)
    pitch = height + (round((LINE_POINTS + 3) * point) if below else gap)
    figure = _pixel_figure(figure_width, top + len(columns) * pitch + gap, dpi)
    figure.suptitle(title, y=1 - 5 / (figure.bbox.height / point), size=9, parse_math=False)

    axes = [
        [
            place(figure, x + m * (width + gap), top + n * pitch, width, height)
            for m in range(number)
        ]
        for n, number in enumerate(columns)
    ]
    for row, text in zip(axes, left, strict=False):
        _write(row[0], text, at=(0, 0.5), offset=(-gap / point, 0), align="right")
    for ax, text in zip(axes[0], above, strict=False):
        _write(ax, text, at=(0.5, 1), offset=(0, LINE_POINTS * head_lines / 2 + 2))
    for row, texts in zip(axes, below, strict=False):
        for ax, text in zip(row, texts, strict=False):
            _write(ax, text, at=(0.5, 0), offset=(0, -LINE_POINTS / 2 - 1))
    return Cells(figure, axes, point, top, right, pitch)


def place(figure: Figure, x: int, y: int, width: int, height: int) -> Axes:
    """Add axes at a position in pixels from the upper left corner of the figure."""
    total_width, total_height = int(figure.bbox.width), int(figure.bbox.height)
    bottom = total_height - y - height
    return figure.add_axes(
        (x / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def show(ax: Axes, picture: np.ndarray, **options: object) -> AxesImage:
    """Fill axes with a picture (3, H, W) or a map (H, W), without ticks or frame."""
    ax.set_axis_off()
    picture = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
    # Nearest-neighbour interpolation would alias unless the cell is a multiple of the picture.
    divides = round(ax.bbox.height) % picture.shape[0] == 0
    return ax.imshow(picture, interpolation="nearest" if divides else "hanning", **options)


def colour_bar(cells: Cells, image: AxesImage, label: str) -> None:
    """Draw the colour bar of a map at the right edge, beside up to three rows."""
    rows = min(len(cells.axes), 3)
    point = cells.point
    height = (rows - 1) * cells.pitch + round(cells.axes[0][0].bbox.height)
    ax = place(cells.figure, cells.right + round(4 * point), cells.top, round(6 * point), height)
    bar = cells.figure.colorbar(image, cax=ax)
    bar.set_label(_wrap(label, (22, 34, 60)[rows - 1]), size=FONT_POINTS, labelpad=2)
    bar.ax.tick_params(labelsize=FONT_POINTS - 1, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)


def _pixel_figure(width: int, height: int, dpi: float) -> Figure:
    """Return an empty figure of exactly width x height pixels."""
    # The extra hundredth keeps rounding errors from cutting off the last pixel.
    figure = Figure(figsize=((width + 0.01) / dpi, (height + 0.01) / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def _write(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    align: str = "center",
) -> None:
    """Write beside a cell: `at` in units of the cell, `offset` from there in points."""
    ax.annotate(
        text,
        at,
        offset,
        xycoords="axes fraction",
        textcoords="offset points",
        ha=align,
        va="center",
        size=FONT_POINTS,
        parse_math=False,  # names may hold dollar signs
    )


def _wrap(text: str, width: int) -> str:
    """Wrap each line of a text at `width` characters."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _text_points(text: str) -> float:
    """Return the width of a text's longest line at `FONT_POINTS`, in points."""
    font = FontProperties(size=FONT_POINTS)
    return max(
        text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]
        for line in text.splitlines() or [""]
    )
