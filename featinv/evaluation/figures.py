"""Figures of pictures: originals, samples and their spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from featinv.evaluation.cells import CELL_PIXELS, colour_bar, make_cells, show
from featinv.metrics import pixel_spread
from featinv.utils.errors import InputError, unknown
from featinv.utils.files import atomic_write
from featinv.utils.pixels import from_uint8

HEAT = "inferno"  # matplotlib's colour map for the spread
SPREAD_LABEL = "standard deviation over samples, in 0..1 pixel units"


def reconstruction_figure(
    originals: Tensor,
    samples: Tensor,
    scores: Tensor,
    captions: Sequence[str] = (),
    title: str = "",
    spread_title: str = "spread",
    ratios: Sequence[float] = (),
) -> Figure:
    """Show each original beside its reconstructions and, for S > 1, their spread.

    A cell is a whole multiple of a sample's size, so that no pixel of a sample is blurred.

    Args:
        originals: uint8, shape (N, 3, H, W).
        samples: Reconstructions, uint8, shape (N, S, 3, h, w).
        scores: Feature cosine of each sample, in [-1, 1], shape (N, S).
        captions: One text per row, e.g. the key and the true class.
        title: Title of the figure.
        spread_title: Title of the spread's column.
        ratios: Calibration ratio of each image, written below its spread.

    Returns:
        A figure with a resolution of its own (`Figure.dpi`).
    """
    num_rows, num_samples, _, height, width = samples.shape
    scale = max(1, round(CELL_PIXELS / max(height, width)))
    several = num_samples > 1
    heads = ["original", *(f"sample {s + 1}" for s in range(num_samples)), spread_title]
    below = [["", *(f"cosine {score:.3f}" for score in row)] for row in scores]
    for texts, ratio in zip(below, ratios, strict=False):
        texts.append(f"calibration {ratio:.2f}")
    cells = make_cells(
        (height * scale, width * scale),
        [1 + num_samples + several] * num_rows,
        left=captions,
        above=heads[: 1 + num_samples + several],
        below=below,
        title=title,
        margin_points=54 * several,
    )
    spread = pixel_spread(from_uint8(samples))
    heat = {"cmap": HEAT, "vmin": 0, "vmax": float(spread.max()) or 1.0}
    for n, row in enumerate(cells.axes):
        for ax, picture in zip(row, [originals[n], *samples[n]], strict=False):
            show(ax, picture.numpy())
        if several:
            image = show(row[-1], spread[n].numpy(), **heat)
    if several:
        colour_bar(cells, image, SPREAD_LABEL)
    return cells.figure


def gallery_figure(
    pictures: Sequence[Sequence[ArrayLike]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Show pictures in rows and columns of equal cells.

    Args:
        pictures: Square pictures, uint8, shape (3, H, W), row by row.
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
    size = (CELL_PIXELS, CELL_PIXELS)
    lengths = list(map(len, pictures))
    cells = make_cells(size, lengths, rows or [], columns or [], captions or [], title)
    for axes, row in zip(cells.axes, pictures, strict=True):
        for ax, picture in zip(axes, row, strict=True):
            show(ax, np.asarray(picture))
    return cells.figure


def columns_figure(
    originals: Tensor,
    rows: Sequence[str],
    columns: Mapping[str, tuple[Tensor, Tensor]],
    title: str = "",
) -> Figure:
    """Show originals beside the reconstructions of several models, with their feature cosines.

    Args:
        originals: uint8, shape (N, 3, H, W).
        rows: One text per original.
        columns: Name -> reconstructions, uint8, shape (N, 3, h, w), and their cosines, shape (N,).
        title: Title of the figure.
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


def heat_picture(heat: ArrayLike) -> np.ndarray:
    """Render a nonnegative map (H, W) in the colours of the spread: uint8, (3, H, W)."""
    heat = np.asarray(heat)
    colours = matplotlib.colormaps[HEAT](heat / max(float(heat.max()), 1e-12), bytes=True)
    return np.moveaxis(colours[..., :3], -1, 0)


def sample_grid(rows: Tensor) -> Tensor:
    """Tile pictures for a quick look during training, one column per image.

    Args:
        rows: E.g. originals and reconstructions, uint8, shape (R, N, 3, H, W).

    Returns:
        The grid, uint8, shape (3, height, width).
    """
    return make_grid(rows.flatten(0, 1), nrow=rows.shape[1], padding=2, pad_value=255)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, in the format of the path's suffix (`png`, `pdf`, `svg`, ...).

    Missing folders are created.

    Raises:
        InputError: Unknown format, or the path cannot be written.
    """
    file_format = Path(path).suffix.lstrip(".").lower()
    formats = figure.canvas.get_supported_filetypes()
    if file_format not in formats:
        raise unknown("figure format", file_format, formats)
    with (
        matplotlib.rc_context({"pdf.fonttype": 42}),  # venues reject the default, Type 3
        atomic_write(path) as file,
    ):
        figure.savefig(file, format=file_format)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a picture (3, H, W), uint8, as PNG, atomically; missing folders are created.

    Raises:
        InputError: The path cannot be written.
    """
    with atomic_write(path) as file:
        Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0))).save(file, "PNG")
