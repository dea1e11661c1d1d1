"""Calibration: whether samples spread as the posterior does, measured by distances alone.

If an image's samples come from the posterior given its features, the original is one more of them:
no test can tell it apart. All measures here follow from that. They apply to any model and any space
with a distance between images, and need no planted truth.
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
    """Accumulates four numbers per image, without keeping its samples.

    Let d be the root mean square difference, x_1 ... x_S the samples of an image, x_0 its original.

    - `between`, the mean of d(x_j, x_k) over pairs of samples, and `to_original`, the mean of
      d(x_j, x_0): see `featinv.metrics.sample_distances`.
    - `ranks`: how many samples are more central than the original, i.e. have a smaller mean
      distance to the S other points; uniform on 0 ... S if calibrated (the rank histogram of
      Gneiting et al. 2008 with the mean distance as pre-rank). High ranks put the original at the
      edge of its samples: overconfident. Low ranks put it in the middle: underconfident.
    - `reference_ranks`: how many samples are closer to a reference point than the original is
      (TARP, Lemos et al. 2023, arXiv 2302.03026); uniform too.

    Args:
        num_samples: Samples S per image, 2 or more.

    Raises:
        InputError: Fewer.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = at_least("num_samples", num_samples, 2)
        self._numbers: dict[str, list[Tensor]] = defaultdict(list)
        self._tie_breaker = torch.Generator().manual_seed(0)

    def update(self, samples: Tensor, originals: Tensor, references: Tensor | None = None) -> None:
        """Add images.

        Args:
            samples: Points in the space to measure in, shape (B, S, ...).
            originals: Shape (B, ...).
            references: One point per image, shape (B, ...), chosen independently of its original
                and samples, e.g. another image; `None` leaves `reference_ranks` out.

        Raises:
            InputError: A different number of samples.
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
            to_reference = rms_distances(points, references[:, None])[..., 0]
            self._add("reference_ranks", self._rank(to_reference))

    @staticmethod
    def of(num_samples: int, numbers: Mapping[str, Tensor]) -> "Calibration":
        """Rebuild a calibration from its `numbers()`."""
        calibration = Calibration(num_samples)
        for name, values in numbers.items():
            calibration._add(name, values)
        return calibration

    def _add(self, name: str, values: Tensor) -> None:
        self._numbers[name].append(values.cpu())

    def _rank(self, values: Tensor) -> Tensor:
        """Rank the last of S + 1 values (B, S + 1), the original's; ties are broken at random."""
        samples, original = values[:, :-1], values[:, -1:]
        below = (samples < original).sum(dim=1).cpu()
        ties = (samples == original).sum(dim=1).cpu()
        # One by one, so that ranks do not depend on the batch size
        uniform = torch.stack([torch.rand((), generator=self._tie_breaker) for _ in below])
        return below + (uniform * (ties + 1)).long()

    def __getitem__(self, name: str) -> Tensor:
        """Return `between`, `to_original`, `ranks` or `reference_ranks` of all images, shape (N,).

        Raises:
            InputError: No images were added, or no references.
        """
        if name not in self._numbers:
            raise InputError(
                f"There are no {name.replace('_', ' ')}: expected at least one image, with a "
                "reference for reference ranks."
            )
        return torch.cat(self._numbers[name])

    def numbers(self) -> dict[str, Tensor]:
        """Return the accumulated numbers by name, each of shape (N,)."""
        return {name: self[name] for name in self._numbers}

    def ratio(self) -> tuple[float, float, float]:
        """Return the calibration ratio and the ends of its 95% bootstrap interval over images."""
        pairs = torch.stack([self["between"], self["to_original"]], dim=1).double().numpy()
        low, high = percentile_interval(calibration_ratio(*bootstrap_means(pairs).T))
        return float(calibration_ratio(*pairs.mean(0))), float(low), float(high)

    def histogram(self, name: str = "ranks") -> Tensor:
        """Count the images of each rank 0 ... S: int64, shape (S + 1,)."""
        return torch.bincount(self[name], minlength=self.num_samples + 1)

    def p_value(self, name: str = "ranks") -> float:
        """Return the p-value of uniform ranks; see `flatness`."""
        return flatness(self[name], self.num_samples + 1)

    def coverage(self) -> dict[str, Tensor]:
        """Return the expected coverage of balls around the references; see `coverage`."""
        return coverage(self["reference_ranks"], self.num_samples + 1)


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


def coverage(reference_ranks: Tensor, num_ranks: int) -> dict[str, Tensor]:
    """Return the expected coverage of random balls (TARP; Lemos et al. 2023, Algorithm 2).

    The ball around a reference point that reaches to the original holds some share of the samples.
    If they are calibrated, that share is below g for a fraction g of the images; with S samples
    this is exact at the levels g = k / (S + 1).

    Args:
        reference_ranks: Samples in the ball, int64 in 0 ... num_ranks - 1, shape (N,).
        num_ranks: S + 1.

    Returns:
        `level`, `coverage`, and `low` and `high`, the pointwise 95% bootstrap interval over images,
        each of shape (S + 2,), in [0, 1]. At high levels overconfident samples cover too little,
        underconfident ones too much.
    """
    levels = np.arange(num_ranks + 1)
    inside = (reference_ranks.numpy()[:, None] < levels).astype(float)  # (N, S + 2)
    low, high = percentile_interval(bootstrap_means(inside))
    curves = {"level": levels / num_ranks, "coverage": inside.mean(axis=0), "low": low}
    return {name: torch.from_numpy(values) for name, values in (curves | {"high": high}).items()}


def other_images(labels: Sequence[int]) -> list[int]:
    """Return for each image the index of the next one of another class, or else of the next one.

    In a folder sorted by class, the next image is mostly of the same class, so closer than chance.

    Args:
        labels: Classes of the images, shape (N,); a negative label is a class of its own.

    Raises:
        InputError: There is only one image.
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
