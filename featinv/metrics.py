"""Fidelity of a reconstruction: pure functions of tensors, and a gatherer of per-image rows.

Everything here is computed in float32, whatever the precision of the features: bfloat16 keeps
three digits, too few to tell two runs apart.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.stats import bootstrap
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchmetrics.utilities import dim_zero_cat

from featinv.utils.errors import InputError

PixelMetric = Callable[[Tensor, Tensor], Tensor]  # two batches of images -> one number for each


def spatial_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the channels at every position, averaged over the positions.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.

    Returns:
        float32 in [-1, 1], shape (B,). A position where either vector is zero counts as 0.
    """
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean(dim=(1, 2))


def pooled_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the spatially averaged feature vectors, blind to where things are.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.

    Returns:
        float32 in [-1, 1], shape (B,); 0 where either average is zero.
    """
    return F.cosine_similarity(a.float().mean(dim=(2, 3)), b.float().mean(dim=(2, 3)), dim=1)


def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """Distance over the whole map as a fraction of the reference's length, ||b - a|| / ||a||.

    Args:
        a: Reference features, shape (B, C, h, w).
        b: Features, same shape.

    Returns:
        float32 in [0, inf), shape (B,); 0 where both are zero.
    """
    a, b = a.float().flatten(1), b.float().flatten(1)
    length = a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (b - a).norm(dim=1) / length


def top_k_agreement(logits_a: Tensor, logits_b: Tensor, k: int) -> Tensor:
    """Whether the best class of `logits_a` is among the best k of `logits_b`.

    Args:
        logits_a: Reference logits, shape (B, num_classes).
        logits_b: Logits, same shape.
        k: At least 1; more than there are classes means all of them.

    Returns:
        float32, 1 where they agree and 0 elsewhere, shape (B,).
    """
    best = logits_a.argmax(dim=1, keepdim=True)  # (B, 1)
    top_k = logits_b.topk(min(k, logits_b.shape[1]), dim=1).indices  # (B, k)
    return (top_k == best).any(dim=1).float()


def pixel_spread(samples: Tensor) -> Tensor:
    """Standard deviation of every pixel over the samples: what the classifier threw away.

    The unbiased estimate of the variance (n - 1) keeps runs with different numbers of samples
    comparable.

    Args:
        samples: Images in [-1, 1], shape (B, S, 3, H, W).

    Returns:
        float32, averaged over the three colours, in units of the 0..1 pixel range, shape
        (B, H, W); zeros for S = 1.
    """
    correction = min(1, samples.shape[1] - 1)
    return (samples.float() / 2).std(dim=1, correction=correction).mean(dim=1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images against others: 10 log10 (range^2 / mean square error).

    Args:
        a: Images in [-1, 1], shape (B, 3, H, W).
        b: Images, same shape.

    Returns:
        float32 in dB, shape (B,); 100 where they are (nearly) the same, instead of infinity, so
        that means and intervals stay numbers.
    """
    ratio = peak_signal_noise_ratio(
        a.float(), b.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=100)


def load_lpips(device: torch.device) -> PixelMetric:
    """Return LPIPS, the distance in AlexNet's features that people see (Zhang et al. 2018).

    Returns:
        A function of two batches of images (B, 3, H, W) in [-1, 1], whose result is 0 for the same
        ones, shape (B,).

    Raises:
        InputError: torchvision's weights of AlexNet cannot be had.
    """
    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
    except OSError as error:
        raise InputError(
            f"The weights of LPIPS, torchvision's AlexNet, cannot be had ({error}): expected "
            "lpips=false, or a connection to download them."
        ) from error
    return lambda a, b: network(a.float(), b.float()).flatten()


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over images (Efron 1979).

    Args:
        values: One number per image, shape (N,).
        confidence: Share of the resampled means inside the interval, in (0, 1).
        num_resamples: How many resampled means are drawn.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end, in the unit of the values. Both are the value itself for one image,
        and nan if a value is nan.

    Raises:
        InputError: There are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise InputError("A confidence interval needs at least one image, got none.")
    if values.size == 1:  # scipy wants two; every resample of one image is that image
        return float(values[0]), float(values[0])
    interval = bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=num_resamples,
        method="percentile",
        batch=100,  # 50,000 images resampled 2,000 times at once would take a gigabyte
        rng=seed,
    ).confidence_interval
    return float(interval.low), float(interval.high)


class FeatureFidelity(Metric):
    """Gathers one row of numbers per image, over batches and ranks.

    Means and intervals are taken afterwards from the rows, so they depend neither on the batch
    size nor on the number of ranks. Its state is never part of a module's `state_dict`.

    Args:
        names: The columns, e.g. `["spatial_cosine", "relative_l2"]`. They are told at the start
            because a rank that gets no image has to take part in the gathering too.
        **options: Of `torchmetrics.Metric`, e.g. `sync_on_compute=False` where each rank adds all.
    """

    full_state_update = False

    def __init__(self, names: Sequence[str], **options: object) -> None:
        super().__init__(**options)
        self.names = tuple(names)
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        # torchmetrics gathers a flat float32 tensor for a rank without data, which neither the
        # int64 indices nor the two-dimensional rows of the other ranks can be joined with.
        self.index.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self.rows.append(torch.empty(0, len(self.names), device=self.device))

    def update(self, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            index: The image's number in the data set, int64, shape (B,).
            values: One number per image, shape (B,), for exactly the names of the constructor.

        Raises:
            ValueError: The names of the values are not those of the constructor.
        """
        if set(values) != set(self.names):
            raise ValueError(f"Expected values for {sorted(self.names)}, got {sorted(values)}.")
        rows = torch.stack([values[name].detach().float() for name in self.names], dim=1)
        self.index.append(index.to(self.device))
        self.rows.append(rows.to(self.device))

    def _wrap_compute(self, compute: Callable) -> Callable:
        """Undo torchmetrics' squeezing of a result with one element: one image is a row too."""
        wrapped = super()._wrap_compute(compute)
        return lambda: {name: value.reshape(-1) for name, value in wrapped().items()}

    def compute(self) -> dict[str, Tensor]:
        """Return the values of every image once, ordered by index.

        Samplers pad the last batch of a rank with images that another rank has too; only the
        first row of an index is kept.

        Returns:
            Name -> float32 tensor, shape (number of distinct indices,).
        """
        index, order = dim_zero_cat(self.index).sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        rows = dim_zero_cat(self.rows)[order[first]]
        return dict(zip(self.names, rows.unbind(dim=1), strict=True))
