"""Figures of images: originals, samples and their spread."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from featinv.utils.errors import InputError, unknown
from featinv.utils.files import atomic_write

SPREAD_LABEL = "standard deviation over samples, in 0..1 pixel units"


CELL_PIXELS = 256  # the longer side of a cell, or the multiple of a sample's nearest to it


CELL_INCHES = 1.2  # six columns fill the text width of a page


FONT_POINTS = 7


LINE_POINTS = 9


def reconstruction_figure(
    originals: ArrayLike,
    samples: ArrayLike,
    spread: ArrayLike,
    captions: Sequence[str] | None = None,
    scores: ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """Draw each original beside its reconstructions and what differs between these.

    A single sample has no spread, so that column is left out then.

    A cell is a whole multiple of a sample's size, so every pixel of a sample is drawn as a square
    of whole pixels and nothing is blurred.

    Args:
        originals: uint8, shape (N, 3, H, W).
        samples: Reconstructions, uint8, shape (N, S, 3, h, w).
        spread: `metrics.pixel_spread` of the samples, in 0..1 pixel units, shape (N, h, w).
        captions: One text per row, e.g. the key and the true class.
        scores: Feature cosine of every sample, in [-1, 1], shape (N, S).
        title: Written above all.

    Returns:
        A figure at a resolution of its own (`Figure.dpi`).
    """
    originals, samples, spread = np.asarray(originals), np.asarray(samples), np.asarray(spread)
    num_rows, num_samples, _, height, width = samples.shape
    scale = max(1, round(CELL_PIXELS / max(height, width)))
    height, width = height * scale, width * scale  # of a cell; all lengths are in figure pixels
    dpi = max(height, width) / CELL_INCHES
    point, gap = dpi / 72, round(dpi / 30)

    captions = [_wrap(caption, 24) for caption in captions or []]
    left = gap + (round(max(map(_text_points, captions)) * point) + 2 * gap if captions else 0)
    row_pitch = height + (gap if scores is None else round((LINE_POINTS + 3) * point))
    several = num_samples > 1
    columns = 1 + num_samples + several
    bar_left = left + columns * (width + gap) + gap
    figure_width = bar_left + (round(50 * point) if several else 0)
    title = _wrap(title, int(figure_width / point / 5.5))
    top = round((LINE_POINTS + 6 + (LINE_POINTS + 4) * len(title.splitlines())) * point)
    figure = _pixel_figure(figure_width, top + num_rows * row_pitch + gap, dpi)
    figure.suptitle(title, y=1 - 5 / (figure.bbox.height / point), size=9, parse_math=False)

    headers = ["original", *(f"sample {s + 1}" for s in range(num_samples)), "spread"][:columns]
    heat = {"cmap": "inferno", "vmin": 0, "vmax": float(spread.max()) or 1.0}
    for n in range(num_rows):
        y = top + n * row_pitch
        cells = [
            _place(figure, left + column * (width + gap), y, width, height)
            for column in range(columns)
        ]
        for ax, picture in zip(cells, [originals[n], *samples[n]], strict=False):
            _show(ax, picture.transpose(1, 2, 0))
        if several:
            image = _show(cells[-1], spread[n], **heat)
        if captions:
            _write(cells[0], captions[n], at=(0, 0.5), offset=(-gap / point, 0), align="right")
        if scores is not None:
            for ax, score in zip(cells[1:], scores[n], strict=False):
                _write(ax, f"cosine {score:.3f}", at=(0.5, 0), offset=(0, -LINE_POINTS / 2 - 1))
        if n == 0:
            for ax, header in zip(cells, headers, strict=True):
                _write(ax, header, at=(0.5, 1), offset=(0, LINE_POINTS / 2 + 2))
    if not several:
        return figure

    bar_rows = min(num_rows, 3)  # a longer bar would not read any better
    bar_height = (bar_rows - 1) * row_pitch + height
    bar = figure.colorbar(image, cax=_place(figure, bar_left, top, round(6 * point), bar_height))
    bar.set_label(_wrap(SPREAD_LABEL, (22, 34, 60)[bar_rows - 1]), size=FONT_POINTS, labelpad=2)
    bar.ax.tick_params(labelsize=FONT_POINTS - 1, length=2, width=0.5, pad=1.5)
    bar.outline.set_linewidth(0.5)
    return figure


def gallery_figure(
    pictures: Sequence[Sequence[ArrayLike]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Lay pictures out in rows and columns, each cell of the same size.

    Args:
        pictures: uint8 pictures of shape (3, H, W), square, row by row.
        rows: One text per row, at its left.
        columns: One text per column, above.
        captions: One text per picture, below it.
        title: Written above all.

    Returns:
        A figure at a resolution of its own (`Figure.dpi`).

    Raises:
        InputError: There is no picture.
    """
    pictures = [[np.asarray(picture) for picture in row] for row in pictures]
    if not pictures or not pictures[0]:
        raise InputError("A gallery needs at least one picture, got none.")
    side = CELL_PIXELS
    dpi = side / CELL_INCHES
    point, gap = dpi / 72, round(dpi / 30)
    rows = [_wrap(text, 24) for text in rows or []]
    left = gap + (round(max(map(_text_points, rows)) * point) + 2 * gap if rows else 0)
    below = round((LINE_POINTS + 3) * point) if captions else gap
    width = left + max(map(len, pictures)) * (side + gap)
    title = _wrap(title, max(20, int(width / point / 5.5)))
    columns = [_wrap(text.replace("_", " "), 20) for text in columns or []]  # breaks at words
    heads = max((text.count("\n") + 1 for text in columns), default=0)
    above = 6 + LINE_POINTS * heads + (LINE_POINTS + 4) * len(title.splitlines())
    top = round(above * point)
    figure = _pixel_figure(width, top + len(pictures) * (side + below) + gap, dpi)
    figure.suptitle(title, y=1 - 5 / (figure.bbox.height / point), size=9, parse_math=False)
    for n, row in enumerate(pictures):
        y = top + n * (side + below)
        for m, picture in enumerate(row):
            ax = _place(figure, left + m * (side + gap), y, side, side)
            _show(ax, picture.transpose(1, 2, 0))
            if captions:
                _write(ax, captions[n][m], at=(0.5, 0), offset=(0, -LINE_POINTS / 2 - 1))
            if columns and n == 0:
                _write(ax, columns[m], at=(0.5, 1), offset=(0, LINE_POINTS * heads / 2 + 2))
            if rows and m == 0:
                _write(ax, rows[n], at=(0, 0.5), offset=(-gap / point, 0), align="right")
    return figure


def columns_figure(
    originals: Tensor,
    rows: Sequence[str],
    columns: Mapping[str, tuple[Tensor, Tensor]],
    title: str = "",
) -> Figure:
    """Draw originals, and beside them what several models made of them, with feature cosines.

    Args:
        originals: uint8, shape (N, 3, H, W).
        rows: One text per original.
        columns: Name -> reconstructions, uint8, shape (N, 3, h, w), and their cosines, shape (N,).
        title: Written above all.
    """
    pictures = [
        [original, *(drawn[i] for drawn, _ in columns.values())]
        for i, original in enumerate(originals)
    ]
    captions = [
        ["", *(f"cosine {cosine[i]:.3f}" for _, cosine in columns.values())]
        for i in range(len(originals))
    ]
    return gallery_figure(pictures, rows, ["original", *columns], captions, title)


def heat_over(image: ArrayLike, heat: ArrayLike, largest: float) -> np.ndarray:
    """Lay a map over a picture: where it is large the picture keeps its colours, elsewhere not.

    Args:
        image: uint8, shape (3, H, W).
        heat: The map, shape (h, w); negative values count as 0.
        largest: The value that shows the picture as it is.

    Returns:
        uint8, shape (3, H, W).
    """
    image = np.asarray(image, dtype=np.float32)
    share = torch.as_tensor(np.asarray(heat, dtype=np.float32) / max(largest, 1e-12)).clamp(0, 1)
    share = F.interpolate(share[None, None], image.shape[1:], mode="bilinear")[0].numpy()
    grey = 64 + 0.25 * image.mean(axis=0, keepdims=True)
    return (share * image + (1 - share) * grey).round().astype(np.uint8)


def _pixel_figure(width: int, height: int, dpi: float) -> Figure:
    """Return an empty figure of exactly so many pixels."""
    # a hundredth of a pixel more, or rounding errors could cost it the last one
    figure = Figure(figsize=((width + 0.01) / dpi, (height + 0.01) / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def _place(figure: Figure, x: int, y: int, width: int, height: int) -> Axes:
    """Add axes given in pixels from the upper left corner of the figure."""
    all_width, all_height = int(figure.bbox.width), int(figure.bbox.height)
    bottom = all_height - y - height
    return figure.add_axes(
        (x / all_width, bottom / all_height, width / all_width, height / all_height)
    )


def _show(ax: Axes, picture: np.ndarray, **kwargs: object) -> AxesImage:
    """Fill axes with a picture, shape (H, W) or (H, W, 3), without ticks or frame."""
    ax.set_axis_off()
    whole = round(ax.bbox.height) % picture.shape[0] == 0
    # sizes that do not divide the cell's would alias with nearest neighbours
    return ax.imshow(picture, interpolation="nearest" if whole else "hanning", **kwargs)


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


def sample_grid(
    originals: Tensor, reconstructions: Tensor, shuffled: Tensor | None = None
) -> Tensor:
    """Lay images out for a quick look while training, one column per image.

    Args:
        originals: First row, uint8, shape (N, 3, H, W).
        reconstructions: Second row, from the images' own features, same shape.
        shuffled: Third row, from another image's features, same shape. A model that ignores its
            features draws the second and the third row alike.

    Returns:
        uint8, shape (3, height, width) of the grid.
    """
    rows = [originals, reconstructions] + ([] if shuffled is None else [shuffled])
    return make_grid(torch.cat(rows), nrow=len(originals), padding=2, pad_value=255)


def style_axes(ax: Axes, x: str, y: str) -> None:
    """Label the axes of a panel in the style of all plots: a light grid, and no box around it."""
    ax.set_xlabel(x, size=8)
    ax.set_ylabel(y, size=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, in the format that the path's ending names (`png`, `pdf`, `svg`, ...).

    The folder is made if need be, and the file is there whole or not at all.

    Raises:
        InputError: There is no such format, or the path cannot be written.
    """
    file_format = Path(path).suffix.lstrip(".").lower()
    formats = figure.canvas.get_supported_filetypes()
    if file_format not in formats:
        raise unknown("figure format", file_format, formats)
    with (
        matplotlib.rc_context({"pdf.fonttype": 42}),  # venues refuse the default, Type 3
        atomic_write(path) as file,
    ):
        figure.savefig(file, format=file_format)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a picture as PNG, whole or not at all; the folder is made if need be.

    Args:
        image: uint8, shape (3, H, W).
        path: Where to.

    Raises:
        InputError: The path cannot be written.
    """
    with atomic_write(path) as file:
        Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0))).save(file, "PNG")
