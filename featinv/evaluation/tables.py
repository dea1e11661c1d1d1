"""Write tables of results as Markdown, LaTeX and CSV."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from featinv.utils.errors import InputError
from featinv.utils.files import write_text

# Characters that LaTeX's default encoding lacks and pandas does not escape
LATEX = str.maketrans(
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$"}
    | {"±": r"$\pm$", "×": r"$\times$"}
)


def format_interval(mean: float, low: float, high: float, digits: int = 3) -> str:
    """Format a mean with its confidence interval, e.g. `0.412 [0.380, 0.441]`."""
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return an aligned Markdown table, readable in a terminal too.

    Args:
        rows: One mapping from column to cell each. Columns are ordered by first appearance; a
            missing cell stays empty.

    Raises:
        InputError: There are no rows.
    """
    table = text_frame(rows).map(lambda cell: cell.replace("|", r"\|"))
    table.columns = [column.replace("|", r"\|") for column in table]
    alignment = ["right" if numeric else "left" for numeric in _numeric_columns(table)]
    return table.to_markdown(index=False, disable_numparse=True, colalign=alignment) + "\n"


def latex_table(rows: Sequence[Mapping[str, str]]) -> str:
    r"""Return a LaTeX `tabular` for the booktabs package, with escaped cells.

    `\input` it inside a `table` environment, which adds caption and label.

    Args:
        rows: As for `markdown_table`.

    Raises:
        InputError: There are no rows.
    """
    table = text_frame(rows)
    alignment = "".join("r" if numeric else "l" for numeric in _numeric_columns(table))
    text = table.to_latex(index=False, escape=True, column_format=alignment).translate(LATEX)
    # After the \\ of the previous line, a bracket would begin an argument.
    return re.sub(r"^\[", "{[}", text, flags=re.MULTILINE)


def save_numbers(results: Mapping, path: str | Path) -> None:
    """Write the numbers behind a table as JSON.

    Args:
        results: Nested mappings of tensors; uint8 tensors are pictures and left out.
        path: The file to write.
    """

    def plain(node: Mapping) -> dict:
        return {
            str(key): plain(value) if isinstance(value, Mapping) else value.tolist()
            for key, value in node.items()
            if isinstance(value, Mapping) or value.dtype != torch.uint8
        }

    write_text(path, f"{json.dumps(plain(results))}\n")


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def save_tables(rows: Sequence[Mapping[str, str]], about: str, folder: str | Path) -> str:
    """Write a table as `table.md`, `table.tex` and `table.csv`.

    Args:
        rows: As for `markdown_table`.
        about: Text below the Markdown table: what the numbers are, and the command.
        folder: Where to write.

    Returns:
        The Markdown.
    """
    text = f"{markdown_table(rows)}\n{about}\n"
    csv = text_frame(rows).to_csv(index=False, lineterminator="\n")
    files = {"md": text, "tex": latex_table(rows), "csv": csv}
    for ending, content in files.items():
        write_text(Path(folder) / f"table.{ending}", content)
    return text


def text_frame(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Return a table of single-line strings.

    Args:
        rows: As for `markdown_table`.

    Raises:
        InputError: There are no rows.
    """
    if not rows:
        raise InputError("A table needs at least one row, got none.")
    return pd.DataFrame(rows).fillna("").map(lambda cell: " ".join(str(cell).split()))


def _numeric_columns(table: pd.DataFrame) -> list[bool]:
    """Return, for each column, whether all filled cells begin like a number."""
    return [
        all(cell.lstrip("-+.")[:1].isdigit() or cell == "nan" for cell in table[column] if cell)
        for column in table
    ]
