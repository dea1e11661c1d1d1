"""A figure as a grid of pictures, each in a cell of whole pixels with texts around it."""

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

CELL_PIXELS = 256  # the longer side of a cell, or the multiple of a picture's nearest to it
CELL_INCHES = 1.2  # six columns fill the text width of a page
FONT_POINTS = 7
LINE_POINTS = 9


@dataclass
class Cells:
    """The cells of a figure, row by row; lengths are in pixels of the figure."""

    figure: Figure
    axes: list[list[Axes]]
    point: float  # a 72nd of an inch
    top: int  # from the upper edge to the first row
    right: int  # from the left edge to the end of the last column
    pitch: int  # from row to row


def make_cells(
    size: tuple[int, int],
    columns: Sequence[int],
    left: Sequence[str] = (),
    above: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
    title: str = "",
    margin_points: float = 0,
) -> Cells:
    """Return a figure with empty cells, and write the texts around them.

    Args:
        size: Height and width of a cell in pixels.
        columns: Number of cells of each row.
        left: One text per row, or none.
        above: One text per column, or none.
        below: For each row one text per cell, or fewer; or none at all.
        title: Written above all.
        margin_points: Room to be left at the right edge.
    """
    height, width = size
    dpi = max(size) / CELL_INCHES
    point, gap = dpi / 72, round(dpi / 30)
    left = [_wrap(text, 24) for text in left]
    above = [_wrap(text.replace("_", " "), 20) for text in above]  # breaks at words
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
    """Add axes given in pixels from the upper left corner of the figure."""
    all_width, all_height = int(figure.bbox.width), int(figure.bbox.height)
    bottom = all_height - y - height
    return figure.add_axes(
        (x / all_width, bottom / all_height, width / all_width, height / all_height)
    )


def show(ax: Axes, picture: np.ndarray, **options: object) -> AxesImage:
    """Fill axes with a picture, shape (3, H, W), or a map, shape (H, W), without ticks or frame."""
    ax.set_axis_off()
    picture = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
    whole = round(ax.bbox.height) % picture.shape[0] == 0
    # sizes that do not divide the cell's would alias with nearest neighbours
    return ax.imshow(picture, interpolation="nearest" if whole else "hanning", **options)


def colour_bar(cells: Cells, image: AxesImage, label: str) -> None:
    """Draw the scale of a map at the right edge, beside the first three rows at most."""
    rows = min(len(cells.axes), 3)  # a longer bar would not read any better
    point = cells.point
    height = (rows - 1) * cells.pitch + round(cells.axes[0][0].bbox.height)
    ax = place(cells.figure, cells.right + round(4 * point), cells.top, round(6 * point), height)
    bar = cells.figure.colorbar(image, cax=ax)
    bar.set_label(_wrap(label, (22, 34, 60)[rows - 1]), size=FONT_POINTS, labelpad=2)
    bar.ax.tick_params(labelsize=FONT_POINTS - 1, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)


def _pixel_figure(width: int, height: int, dpi: float) -> Figure:
    """Return an empty figure of exactly so many pixels."""
    # a hundredth of a pixel more, or rounding errors could cost it the last one
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
        parse_math=False,  # a name with two dollar signs is no formula
    )


def _wrap(text: str, width: int) -> str:
    """Wrap a text at `width` characters, and keep the line breaks that it has."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _text_points(text: str) -> float:
    """Return the width of a text's longest line at `FONT_POINTS`, in points."""
    font = FontProperties(size=FONT_POINTS)
    return max(
        text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]
        for line in text.splitlines() or [""]
    )
