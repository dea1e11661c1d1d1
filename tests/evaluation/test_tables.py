import csv
import io
import json

import pytest
import torch

from featinv.evaluation.tables import csv_table, latex_table, markdown_table, save_numbers
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


def test_csv_reads_back():
    found = list(csv.DictReader(io.StringIO(csv_table(ROWS))))
    assert found[0] == ROWS[0] | {"note": ""}
    assert found[1] == ROWS[1] | {"top-1": "", "note": "two lines <"}


@pytest.mark.parametrize("table", [markdown_table, latex_table, csv_table])
def test_a_table_without_rows_is_an_input_error(table):
    with pytest.raises(InputError, match="at least one row"):
        table([])


def test_numbers_are_written_without_pictures(tmp_path):
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    results = {0.5: {"a": torch.tensor([1.0, 2.0]), "drawn": pictures}, "b": torch.tensor(3)}
    save_numbers(results, tmp_path / "new" / "results.json")
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written == {"0.5": {"a": [1, 2]}, "b": 3}
