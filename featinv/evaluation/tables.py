"""Tables of results: Markdown, LaTeX and CSV."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from featinv.utils.errors import InputError
from featinv.utils.files import atomic_write

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$"}
    | {"±": r"$\pm$", "×": r"$\times$"}
)


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

    with atomic_write(path) as file:
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
        with atomic_write(Path(folder) / f"table.{ending}") as file:
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
