"""Random numbers that depend on a seed and a sample's number, never on batch size or rank.

Each image that is cropped, noised or sampled has its own generator, seeded with the run's seed and
the numbers that identify the draw (as in NVlabs' EDM2).
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """Purpose of a draw: draws for different purposes differ under the same seed and number."""

    ORDER = 1
    SHUFFLE = 2
    CROP = 3
    TRAINING = 4
    VALIDATION = 5
    SAMPLING = 6
    PERTURBATION = 7
    INFORMATION = 8


def make_generator(*entropy: int) -> torch.Generator:
    """Return a CPU generator seeded with non-negative integers: seed, `Draw`, numbers."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def randn(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw standard normal noise, row i from generator i: (len(generators), *shape) on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
