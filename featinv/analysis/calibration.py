"""Calibration: whether samples spread as a posterior does, measured by distances alone.

If the samples of an image come from the posterior of images given its features, then the original
is one more of them: no test can tell it apart. Everything here follows from that, for
any model and any space in which images have a distance, and needs no planted truth.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from featinv.metrics import (
    bootstrap_means,
    calibration_ratio,
    percentile_interval,
    rms_distances,
    sample_distances,
)
from featinv.utils.errors import InputError, at_least


class Calibration:
    """Gathers four numbers of each image: its samples themselves are forgotten.

    Let d be the root mean square difference, x_1 ... x_S the samples of an image, x_0 its original.

    - `between`, the mean of d(x_j, x_k) over pairs of samples, and `to_original`, the mean of
      d(x_j, x_0): see `featinv.metrics.sample_distances`.
    - `ranks`: how many samples are more central than the original, that is, have a smaller mean
      distance to the S other points; uniform on 0 ... S (the rank histogram of Gneiting et al.
      2008, with the mean distance for pre-rank). High ranks, an original at the edge of its
      samples, mean overconfidence; low ones, an original in their middle, samples too wild.
    - `reference_ranks`: how many samples are nearer to a reference point than the original is
      (TARP, Lemos et al. 2023, arXiv 2302.03026); uniform too.

    Args:
        num_samples: Samples S of each image, 2 or more.

    Raises:
        InputError: Fewer.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = at_least("num_samples", num_samples, 2)
        self._numbers: dict[str, list[Tensor]] = defaultdict(list)
        self._ties = torch.Generator().manual_seed(0)  # decides them, image after image

    def update(self, samples: Tensor, originals: Tensor, references: Tensor | None = None) -> None:
        """Add images.

        Args:
            samples: In the space to measure in, shape (B, S, ...).
            originals: Shape (B, ...).
            references: A point for each image, shape (B, ...), chosen without a look at its
                original or samples, e.g. another image; `None` leaves coverage out.

        Raises:
            InputError: Another number of samples.
        """
        if samples.shape[1] != self.num_samples:
            raise InputError(
                f"There are {samples.shape[1]} samples of each image, expected {self.num_samples}."
            )
        points = torch.cat([samples, originals[:, None]], dim=1)
        between, to_original = sample_distances(samples, originals)
        self._add("between", between)
        self._add("to_original", to_original)
        self._add("ranks", self._rank(rms_distances(points, points).sum(dim=2)))
        if references is not None:
            reach = rms_distances(points, references[:, None])[..., 0]
            self._add("reference_ranks", self._rank(reach))

    @staticmethod
    def of(num_samples: int, numbers: Mapping[str, Tensor]) -> "Calibration":
        """Return the calibration whose `numbers` these are."""
        calibration = Calibration(num_samples)
        for name, values in numbers.items():
            calibration._add(name, values)
        return calibration

    def _add(self, name: str, values: Tensor) -> None:
        self._numbers[name].append(values.cpu())

    def _rank(self, values: Tensor) -> Tensor:
        """Return how many of S numbers (B, S + 1) are below the last one, the original's."""
        samples, original = values[:, :-1], values[:, -1:]
        below = (samples < original).sum(dim=1).cpu()
        ties = (samples == original).sum(dim=1).cpu()
        share = torch.stack([torch.rand((), generator=self._ties) for _ in below])
        return below + (share * (ties + 1)).long()

    def __getitem__(self, name: str) -> Tensor:
        """Return a number of all images, shape (N,), by its name.

        Raises:
            InputError: No images were added, or no references.
        """
        if name not in self._numbers:
            raise InputError(f"There is no image to know the {name.replace('_', ' ')} of.")
        return torch.cat(self._numbers[name])

    def numbers(self) -> dict[str, Tensor]:
        """Return all numbers of all images, by their names."""
        return {name: self[name] for name in self._numbers}

    def ratio(self) -> tuple[float, float, float]:
        """Return the calibration ratio, and the ends of its 95% bootstrap interval over images."""
        pairs = torch.stack([self["between"], self["to_original"]], dim=1).double().numpy()
        low, high = percentile_interval(calibration_ratio(*bootstrap_means(pairs).T))
        return float(calibration_ratio(*pairs.mean(0))), float(low), float(high)

    def histogram(self, name: str = "ranks") -> Tensor:
        """Return how many images have each rank 0 ... S, int64, shape (S + 1,)."""
        return torch.bincount(self[name], minlength=self.num_samples + 1)

    def p_value(self, name: str = "ranks") -> float:
        """Return the p-value of flat ranks; see `flatness`."""
        return flatness(self[name], self.num_samples + 1)

    def coverage(self) -> dict[str, Tensor]:
        """Return the coverage by random reference points; see `coverage`."""
        return coverage(self["reference_ranks"], self.num_samples + 1)


def flatness(ranks: Tensor, num_ranks: int) -> float:
    """Return the p-value of Pearson's chi-square test that ranks are uniform.

    Neighbouring ranks are counted together until 5 images are expected in each bin.

    Args:
        ranks: int64 in 0 ... num_ranks - 1, shape (N,).
        num_ranks: How many ranks are possible.

    Returns:
        In [0, 1]; nan for fewer than 10 images.
    """
    num_bins = min(num_ranks, len(ranks) // 5)
    if num_bins < 2:
        return float("nan")
    parts = np.array_split(np.bincount(ranks.numpy(), minlength=num_ranks), num_bins)
    expected = [len(ranks) * len(part) / num_ranks for part in parts]
    return float(chisquare([part.sum() for part in parts], expected).pvalue)


def coverage(reference_ranks: Tensor, num_ranks: int) -> dict[str, Tensor]:
    """Return the expected coverage by random points (TARP; Lemos et al. 2023, Algorithm 2).

    The ball around a reference point that reaches to the original holds a share of the samples; of
    calibrated ones, a share g of the originals has a share below g. With S samples that is exact
    at the levels g = k / (S + 1).

    Args:
        reference_ranks: Samples in the ball, int64 in 0 ... num_ranks - 1, shape (N,).
        num_ranks: S + 1.

    Returns:
        `level`, `coverage`, and `low` and `high`, the ends of its 95% bootstrap interval over the
        images at that level, each of shape (S + 2,), from 0 to 1. Overconfident samples cover too
        little at high levels, those that are too wild too much.
    """
    levels = np.arange(num_ranks + 1)
    inside = (reference_ranks.numpy()[:, None] < levels).astype(float)  # (N, S + 2)
    low, high = percentile_interval(bootstrap_means(inside))
    numbers = {"level": levels / num_ranks, "coverage": inside.mean(axis=0)}
    numbers |= {"low": low, "high": high}
    return {name: torch.from_numpy(values) for name, values in numbers.items()}


def other_images(labels: Sequence[int]) -> list[int]:
    """Return for each image the next one of another class, and failing that the next one.

    In a folder sorted by class the neighbour is of the same, so nearer than chance.

    Args:
        labels: The images' classes, shape (N,); negative ones are unknown, and all different.

    Raises:
        InputError: There is but one image.
    """
    number = len(labels)
    if number < 2:
        raise InputError("There is no other image to compare with: expected two or more.")
    others = []
    for i, label in enumerate(labels):
        following = ((i + k) % number for k in range(1, number))
        other_class = (j for j in following if labels[j] < 0 or labels[j] != label)
        others.append(next(other_class, (i + 1) % number))
    return others
