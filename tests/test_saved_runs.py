"""Runs saved by earlier versions still load, and draw what they drew."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featinv import FeatInv

SAVED = Path(__file__).parent / "saved_runs"


@pytest.mark.parametrize("version", sorted(folder.name for folder in SAVED.iterdir()))
def test_a_run_saved_by_an_earlier_version_draws_the_same_images(version):
    expected = load_file(SAVED / version / "expected.safetensors")
    model = FeatInv.load(SAVED / version)
    samples = model.invert(expected["features"], num_samples=2, seed=3, num_steps=3)
    torch.testing.assert_close(samples, expected["samples"], rtol=0, atol=1e-5)
