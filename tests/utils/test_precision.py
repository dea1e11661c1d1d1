import logging

import pytest
import torch

from featinv.utils import precision
from featinv.utils.precision import resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def timed(monkeypatch, caplog):
    """Let float32 take 10 ms; return a function that says how long bfloat16 takes."""
    caplog.set_level(logging.INFO)

    def timed(half: float) -> None:
        seconds = {"32-true": 0.01, "bf16-mixed": half}
        monkeypatch.setattr(precision, "convolution_seconds", lambda device: seconds)

    return timed


@pytest.fixture
def untimed(monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def refuse(device):
        raise AssertionError("was timed")

    monkeypatch.setattr(precision, "convolution_seconds", refuse)


@pytest.mark.parametrize(("half", "faster"), [(0.005, "bf16-mixed"), (0.33, "32-true")])
def test_auto_takes_the_faster_and_says_why(timed, caplog, half, faster):
    timed(half)
    assert resolve_precision("auto", CPU) == faster
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "INFO",
            f"precision={faster}: a convolution takes 10.0 ms in 32-true, {1000 * half:.1f} ms in "
            "bf16-mixed on this cpu",
        )
    ]


@pytest.mark.parametrize(("half", "warned"), [(0.021, True), (0.019, False)])
def test_an_explicit_choice_is_kept_with_a_warning_if_far_slower(timed, caplog, half, warned):
    timed(half)
    assert resolve_precision("bf16-mixed", CPU) == "bf16-mixed"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("precision=auto would take 32-true" in caplog.text) == warned


def test_float32_is_right_everywhere_and_never_timed(untimed, caplog):
    assert resolve_precision("32-true", CPU) == "32-true"
    assert not caplog.records


@pytest.mark.parametrize("asked", ["auto", "bf16-mixed"])
def test_a_gpu_with_bfloat16_is_not_timed(untimed, monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision(asked, GPU) == "bf16-mixed"


def test_a_gpu_that_emulates_bfloat16_is_timed(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    timed(0.1)
    assert resolve_precision("auto", GPU) == "32-true"


def test_a_convolution_is_timed_in_both_precisions():
    seconds = precision.convolution_seconds(CPU)
    assert set(seconds) == {"32-true", "bf16-mixed"} and min(seconds.values()) > 0
