"""Figures of pictures: originals, samples and their spread."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from featinv.metrics import pixel_spread
from featinv.utils.errors import InputError
from featinv.utils.files import atomic_write
from featinv.utils.pixels import from_uint8

HEAT = "inferno"  # matplotlib's colour map for the spread
CELL_PIXELS = 256  # target for the side of a cell
CELL_INCHES = 1.2  # six columns fill the text width of a page
FONT_POINTS = 7
LINE_POINTS = 9


def reconstruction_figure(
    originals: Tensor,
    samples: Tensor,
    scores: Tensor,
    rows: Sequence[str] = (),
    title: str = "",
    ratios: Sequence[float] = (),
    calibration: str = "",
) -> Figure:
    """Show each original beside its reconstructions and, for S > 1, their spread.

    Args:
        originals: uint8, shape (N, 3, H, H).
        samples: Reconstructions, uint8, shape (N, S, 3, h, h).
        scores: Feature cosine of each sample, in [-1, 1], shape (N, S).
        rows: One text per row, e.g. the key and the true class.
        title: Title of the figure.
        ratios: Calibration ratio of each image, written below its spread.
        calibration: Written above the spreads, below the value of their brightest colour.

    Returns:
        As `gallery_figure`.
    """
    pictures = [[original, *drawn] for original, drawn in zip(originals, samples, strict=True)]
    captions = [["", *(f"cosine {score:.3f}" for score in row)] for row in scores]
    columns = ["original", *(f"sample {s + 1}" for s in range(samples.shape[1]))]
    if samples.shape[1] > 1:
        spread = pixel_spread(from_uint8(samples))  # (N, h, h)
        largest = float(spread.max())
        columns.append(f"spread, up to {largest:.2f}\n{calibration}".strip())
        for i, heat in enumerate(spread):
            pictures[i].append(heat_picture(heat, largest))
            ratio = f"\ncalibration {ratios[i]:.2f}" if ratios else ""
            captions[i].append(f"mean {heat.mean():.3f}{ratio}")
    return gallery_figure(pictures, rows, columns, captions, title)


def gallery_figure(
    pictures: Sequence[Sequence[ArrayLike]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
) -> Figure:
    """Show pictures in rows and columns of equal cells.

    The side of a cell is a multiple of that of the smallest picture, whose pixels stay sharp.

    Args:
        pictures: Square pictures, uint8, shape (3, H, H), row by row.
        rows: One text per row, to its left.
        columns: One text per column, above it.
        captions: One text per picture, below it.
        title: Title of the figure.

    Returns:
        A figure with a resolution of its own (`Figure.dpi`).

    Raises:
        InputError: There is no picture.
    """
    if not pictures or not pictures[0]:
        raise InputError("A gallery needs at least one picture, got none.")
    pictures = [[np.asarray(picture) for picture in row] for row in pictures]
    side = min(picture.shape[-1] for row in pictures for picture in row)
    side *= max(1, round(CELL_PIXELS / side))
    dpi = side / CELL_INCHES
    point, gap = dpi / 72, round(dpi / 30)  # in pixels, as all lengths below
    left = [_wrap(text, 24) for text in rows]
    above = [_wrap(text.replace("_", " "), 20) for text in columns]  # so that lines break at words
    line = LINE_POINTS * point
    start = gap + (round(max(map(_text_points, left)) * point) + 2 * gap if left else 0)
    width = start + max(map(len, pictures)) * (side + gap)
    title = _wrap(title, max(20, int(width / point / 5.5)))
    top = round(6 * point + _lines(above) * line + len(title.splitlines()) * (line + 4 * point))
    below = round(_lines(text for row in captions for text in row) * line + 3 * point)
    pitch = side + (below if captions else gap)
    height = top + len(pictures) * pitch + gap
    # The extra hundredth keeps rounding errors from cutting off the last pixel.
    figure = Figure(figsize=((width + 0.01) / dpi, (height + 0.01) / dpi), dpi=dpi)
    figure.suptitle(title, y=1 - 5 * point / height, size=9, parse_math=False)
    for n, row in enumerate(pictures):
        bottom = height - top - n * pitch - side
        for m, picture in enumerate(row):
            corner = (start + m * (side + gap)) / width, bottom / height
            ax = figure.add_axes((*corner, side / width, side / height))
            _show(ax, picture, side)
            if n == 0 and m < len(above):
                _write(ax, above[m], (0.5, 1), (0, LINE_POINTS * _lines(above) / 2 + 2))
            if m == 0 and n < len(left):
                _write(ax, left[n], (0, 0.5), (-gap / point, 0), align="right")
            if captions:
                _write(ax, captions[n][m], (0.5, 0), (0, -2), vertical="top")
    return figure


def _show(ax: Axes, picture: np.ndarray, side: int) -> None:
    """Fill a cell with a picture, without ticks or frame."""
    ax.set_axis_off()
    # Nearest-neighbour interpolation would alias unless the cell is a multiple of the picture.
    sharp = side % picture.shape[1] == 0
    ax.imshow(np.moveaxis(picture, 0, -1), interpolation="nearest" if sharp else "hanning")


def _write(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    align: str = "center",
    vertical: str = "center",
) -> None:
    """Write beside a cell: `at` in units of the cell, `offset` from there in points."""
    ax.annotate(
        text,
        at,
        offset,
        xycoords="axes fraction",
        textcoords="offset points",
        ha=align,
        va=vertical,
        size=FONT_POINTS,
        parse_math=False,  # names may hold dollar signs
    )


def _wrap(text: str, width: int) -> str:
    """Wrap each line of a text at `width` characters."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _lines(texts: Iterable[str]) -> int:
    """Return the number of lines of the longest text."""
    return max((text.count("\n") + 1 for text in texts), default=0)


def _text_points(text: str) -> float:
    """Return the width of a text's longest line at `FONT_POINTS`, in points."""
    font = FontProperties(size=FONT_POINTS)
    return max(
        text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]
        for line in text.splitlines() or [""]
    )


def highlight(image: ArrayLike, heat: ArrayLike, largest: float) -> np.ndarray:
    """Highlight a picture where a map is large, and fade it to grey elsewhere.

    Args:
        image: uint8, shape (3, H, W).
        heat: The map, shape (h, w); negative values count as 0.
        largest: Value from which the picture shows its full colours.

    Returns:
        uint8, shape (3, H, W).
    """
    image = np.asarray(image, dtype=np.float32)
    alpha = torch.as_tensor(np.asarray(heat, dtype=np.float32) / max(largest, 1e-12)).clamp(0, 1)
    alpha = F.interpolate(alpha[None, None], image.shape[1:], mode="bilinear")[0].numpy()
    grey = 64 + 0.25 * image.mean(axis=0, keepdims=True)
    return (alpha * image + (1 - alpha) * grey).round().astype(np.uint8)


def heat_picture(heat: ArrayLike, largest: float | None = None) -> np.ndarray:
    """Render a nonnegative map (H, W) in the colours of the spread.

    Args:
        heat: The map.
        largest: Value of the brightest colour; `None`: the largest of the map.

    Returns:
        uint8, shape (3, H, W).
    """
    heat = np.asarray(heat)
    largest = float(heat.max()) if largest is None else largest
    colours = matplotlib.colormaps[HEAT](heat / max(largest, 1e-12), bytes=True)
    return np.moveaxis(colours[..., :3], -1, 0)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, in the format of the path's suffix (`png`, `pdf`, `svg`, ...).

    Missing folders are created.

    Raises:
        InputError: The path cannot be written.
    """
    with (
        matplotlib.rc_context({"pdf.fonttype": 42}),  # venues reject the default, Type 3
        atomic_write(path) as file,
    ):
        figure.savefig(file, format=Path(path).suffix.lstrip("."))


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a picture (3, H, W), uint8, as PNG, atomically; missing folders are created.

    Raises:
        InputError: The path cannot be written.
    """
    with atomic_write(path) as file:
        Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0))).save(file, "PNG")
