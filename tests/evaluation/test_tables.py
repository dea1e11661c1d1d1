import csv
import json

import pytest
import torch

from featinv.evaluation.tables import latex_table, markdown_table, save_numbers, save_tables
from featinv.utils.errors import InputError

ROWS = [
    {"backbone": "resnet50", "cosine ↑": "0.412 [0.380, 0.441]", "top-1": "-3"},
    {"backbone": "[a|b]_c & 5%", "cosine ↑": "0.5", "note": "two\nlines <"},
]


def test_markdown_is_aligned_and_escaped():
    assert markdown_table(ROWS) == (
        "| backbone      |             cosine ↑ |   top-1 | note        |\n"
        "|:--------------|---------------------:|--------:|:------------|\n"
        "| resnet50      | 0.412 [0.380, 0.441] |      -3 |             |\n"
        "| [a\\|b]_c & 5% |                  0.5 |         | two lines < |\n"
    )


def test_latex_is_escaped_and_a_leading_bracket_is_no_argument():
    begin, toprule, head, midrule, first, second, bottomrule, end = latex_table(ROWS).splitlines()
    assert (begin, end) == (r"\begin{tabular}{lrrl}", r"\end{tabular}")
    assert (toprule, midrule, bottomrule) == (r"\toprule", r"\midrule", r"\bottomrule")
    assert head == r"backbone & cosine $\uparrow$ & top-1 & note \\"
    assert first == r"resnet50 & 0.412 [0.380, 0.441] & -3 &  \\"
    assert second == r"{[}a\textbar{}b]\_c \& 5\% & 0.5 &  & two lines \textless{} \\"


def test_all_formats_are_saved_and_csv_reads_back(tmp_path):
    text = save_tables(ROWS, "About.", tmp_path)
    assert text == f"{markdown_table(ROWS)}\nAbout.\n" == (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.tex").read_text() == latex_table(ROWS)
    found = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert found[0] == ROWS[0] | {"note": ""}
    assert found[1] == ROWS[1] | {"top-1": "", "note": "two lines <"}


def test_a_table_without_rows_is_an_input_error():
    with pytest.raises(InputError, match="at least one row"):
        markdown_table([])


def test_numbers_are_written_without_pictures(tmp_path):
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    results = {0.5: {"a": torch.tensor([1.0, 2.0]), "drawn": pictures}, "b": torch.tensor(3)}
    save_numbers(results, tmp_path / "new" / "results.json")
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written == {"0.5": {"a": [1, 2]}, "b": 3}
