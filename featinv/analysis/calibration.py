"""Calibration: whether samples spread as the posterior does, measured by distances alone.

If an image's samples come from the posterior given its features, the original is one more of them:
no test can tell it apart. All measures here follow from that. They apply to any model and any space
with a distance between images, and need no planted truth.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import chisquare
from torch import Tensor

from featinv.metrics import (
    bootstrap_means,
    calibration_ratio,
    percentile_interval,
    rms_distances,
    sample_distances,
)
from featinv.utils.errors import at_least
from featinv.utils.seeding import Draw, make_generator


def calibrate(
    samples: Tensor, originals: Tensor, references: Tensor, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Compare the samples x_1 ... x_S of each image with its original x_0, in any space.

    With the root mean square difference d:

    - `between` is the mean of d(x_j, x_k) over pairs of samples, and `to_original` the mean of
      d(x_j, x_0): see `ratio_interval`.
    - `ranks` is the number of samples that are more central than the original, i.e. have a smaller
      mean distance to the S other points; uniform on 0 ... S if calibrated (the rank histogram of
      Gneiting et al. 2008 with the mean distance as pre-rank). High ranks put the original at the
      edge of its samples: overconfident. Low ranks put it in the middle: underconfident.
    - `reference_ranks` is the number of samples that are closer to the reference than the original
      is (TARP, Lemos et al. 2023, arXiv 2302.03026); uniform too.

    Args:
        samples: Points in the space to measure in, shape (B, S, ...), S at least 2.
        originals: Shape (B, ...).
        references: One point per image, shape (B, ...), chosen independently of its original and
            samples, e.g. another image.
        indices: Index of each image, shape (B,), which seeds the draw that breaks ties of its
            ranks.

    Returns:
        These four by name, each of shape (B,), on the CPU.

    Raises:
        InputError: A single sample.
    """
    at_least("num_samples", samples.shape[1], 2)
    points = torch.cat([samples, originals[:, None]], dim=1)
    between, to_original = sample_distances(samples, originals)
    to_others = rms_distances(points, points).sum(dim=2)
    to_reference = rms_distances(points, references[:, None])[..., 0]
    generators = [make_generator(0, Draw.SHUFFLE, int(index)) for index in indices]
    return {
        "between": between.cpu(),
        "to_original": to_original.cpu(),
        "ranks": _rank(to_others, generators),
        "reference_ranks": _rank(to_reference, generators),
    }


def _rank(values: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Rank the last of S + 1 values (B, S + 1), the original's; ties are broken at random."""
    samples, original = values[:, :-1], values[:, -1:]
    below = (samples < original).sum(dim=1).cpu()
    ties = (samples == original).sum(dim=1).cpu()
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
    return below + (uniform * (ties + 1)).long()


def ratio_interval(
    between: Tensor, to_original: Tensor, photographs: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Return the calibration ratio of a set of images, and the ends of its 95% interval.

    Args:
        between: From `calibrate` or `featinv.metrics.sample_distances`, shape (N,).
        to_original: Likewise.
        photographs: Which photograph each image shows: these are resampled.
    """
    pairs = torch.stack([between, to_original], dim=1).double().numpy()
    low, high = percentile_interval(calibration_ratio(*bootstrap_means(pairs, photographs).T))
    return float(calibration_ratio(*pairs.mean(0))), float(low), float(high)


def flatness(ranks: Tensor, num_ranks: int) -> float:
    """Return the p-value of Pearson's chi-square test that ranks are uniform.

    Neighbouring ranks are binned together so that each bin expects at least 5 images.

    Args:
        ranks: int64 in 0 ... num_ranks - 1, shape (N,).
        num_ranks: Number of possible ranks.

    Returns:
        In [0, 1]; nan for fewer than 10 images.
    """
    num_bins = min(num_ranks, len(ranks) // 5)
    if num_bins < 2:
        return float("nan")
    parts = np.array_split(np.bincount(ranks.numpy(), minlength=num_ranks), num_bins)
    expected = [len(ranks) * len(part) / num_ranks for part in parts]
    return float(chisquare([part.sum() for part in parts], expected).pvalue)


def coverage(
    reference_ranks: Tensor, num_ranks: int, photographs: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the expected coverage of random balls (TARP; Lemos et al. 2023, Algorithm 2).

    The ball around a reference point that reaches to the original holds some share of the samples.
    If they are calibrated, that share is below g for a fraction g of the images; with S samples
    this is exact at the levels g = k / (S + 1).

    Args:
        reference_ranks: Samples in the ball, int64 in 0 ... num_ranks - 1, shape (N,).
        num_ranks: S + 1.
        photographs: Which photograph each image shows: these are resampled.

    Returns:
        Levels, coverage, and the lower and upper ends of its pointwise 95% bootstrap interval, each
        of shape (S + 2,), in [0, 1]. At high levels overconfident samples cover too little,
        underconfident ones too much.
    """
    levels = np.arange(num_ranks + 1)
    inside = (reference_ranks.numpy()[:, None] < levels).astype(float)  # (N, S + 2)
    low, high = percentile_interval(bootstrap_means(inside, photographs))
    return levels / num_ranks, inside.mean(axis=0), low, high
