"""Tables (Markdown, LaTeX, CSV) and figures of results: pure functions of plain data.

Figures are built on `matplotlib.figure.Figure`, not pyplot, so nothing is global: they work in a
training loop, in threads and without a display.
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
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
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from featinv.errors import InputError, unknown
from featinv.files import whole_file

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$"}
    | {"±": r"$\pm$", "×": r"$\times$"}
)

SPREAD_LABEL = "standard deviation over samples, in 0..1 pixel units"
CELL_PIXELS = 256  # the longer side of a cell, or the multiple of a sample's nearest to it
CELL_INCHES = 1.2  # six columns fill the text width of a page
FONT_POINTS = 7
LINE_POINTS = 9


def format_interval(mean: float, low: float, high: float, digits: int = 3) -> str:
    """Return a mean with its confidence interval, e.g. `0.412 [0.380, 0.441]`."""
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table whose columns are aligned, so that it reads well in a terminal too.

    Args:
        rows: One mapping from column to cell each. The columns are all keys in the order of their
            first appearance; a missing cell stays empty.

    Raises:
        InputError: There are no rows.
    """
    table = [[_one_line(cell).replace("|", r"\|") for cell in line] for line in table_cells(rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    right = _numeric_columns(table)
    rule = [
        "-" * (width - 1) + ":" if r else "-" * width
        for width, r in zip(widths, right, strict=True)
    ]
    lines = [table[0], rule, *table[1:]]
    return "".join(f"| {' | '.join(_pad(line, widths, right))} |\n" for line in lines)


def latex_table(rows: Sequence[Mapping[str, str]]) -> str:
    r"""Return a LaTeX `tabular` in the style of the booktabs package, cells escaped.

    Caption and label belong to the paper: `\input` the table inside a `table` environment.

    Args:
        rows: As for `markdown_table`.

    Raises:
        InputError: There are no rows.
    """
    table = [[_one_line(cell).translate(LATEX) for cell in line] for line in table_cells(rows)]
    for line in table:
        if line[0].startswith("["):  # after the \\ of the line before it would be an argument
            line[0] = "{[}" + line[0][1:]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = _numeric_columns(table)
    head, *body = [f"{' & '.join(_pad(line, widths, right))} \\\\" for line in table]
    alignment = "".join("r" if r else "l" for r in right)
    begin, end = f"\\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    lines = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end]
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table as comma-separated values (RFC 4180, but with plain line feeds).

    Args:
        rows: As for `markdown_table`.

    Raises:
        InputError: There are no rows.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table_cells(rows))
    return text.getvalue()


def save_numbers(results: Mapping, path: str | Path) -> None:
    """Write what stands behind a table as JSON, without the pictures.

    Args:
        results: Nested mappings whose leaves are tensors; those of uint8 are pictures.
        path: Where to.
    """

    def plain(node: Mapping) -> dict:
        return {
            str(key): plain(value) if isinstance(value, Mapping) else value.tolist()
            for key, value in node.items()
            if isinstance(value, Mapping) or value.dtype != torch.uint8
        }

    with whole_file(path) as file:
        file.write(f"{json.dumps(plain(results))}\n".encode())


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def save_tables(rows: Sequence[Mapping[str, str]], about: str, folder: str | Path) -> str:
    """Write a table as `table.md`, with a text below, `table.tex` and `table.csv`.

    Args:
        rows: As for `markdown_table`.
        about: What the numbers are, and the command that made them.
        folder: Where to.

    Returns:
        The Markdown, to be printed.
    """
    text = f"{markdown_table(rows)}\n{about}\n"
    files = {"md": text, "tex": latex_table(rows), "csv": csv_table(rows)}
    for ending, content in files.items():
        with whole_file(Path(folder) / f"table.{ending}") as file:
            file.write(content.encode())
    return text


def table_cells(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return the header and then one list per row, all of the same length.

    Args:
        rows: As for `markdown_table`.

    Raises:
        InputError: There are no rows.
    """
    if not rows:
        raise InputError("A table needs at least one row, got none.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]


def _one_line(cell: str) -> str:
    return " ".join(cell.split())


def _numeric_columns(table: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each column whether all its filled cells begin like a number."""
    _, *body = table
    return [
        all(cell.lstrip("-+.")[:1].isdigit() or cell == "nan" for cell in column if cell)
        for column in zip(*body, strict=True)
    ]


def _pad(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if r else cell.ljust(width)
        for cell, width, r in zip(line, widths, right, strict=True)
    ]


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


def style_axes(ax: Axes, x: str, y: str) -> None:
    """Label the axes of a panel in the style of all plots: a light grid, and no box around it."""
    ax.set_xlabel(x, size=8)
    ax.set_ylabel(y, size=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)


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
        whole_file(path) as file,
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
    with whole_file(path) as file:
        Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0))).save(file, "PNG")
