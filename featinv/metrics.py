"""Fidelity of reconstructions: pure functions of tensors, and intervals of their means.

Everything here is computed in float32, whatever the precision of the features: bfloat16 keeps
three digits, too few to tell two runs apart.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

from featinv.utils.downloads import check_download
from featinv.utils.errors import InputError
from featinv.utils.pixels import to_uint8

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


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the root mean square differences, (B, P, Q), of points (B, P, ...) and (B, Q, ...)."""
    a, b = a.float().flatten(2), b.float().flatten(2)
    # By differences: the faster way, by products, cancels where points are near each other.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[2] ** 0.5


def sample_distances(samples: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """How far an image's samples are from each other, and from the original; see `distances`.

    Args:
        samples: In any space, shape (B, S, ...), S at least 2.
        originals: Shape (B, ...).

    Returns:
        Mean distance of two samples, and of a sample to the original, each float32 (B,). If the
        original is exchangeable with the samples, as with those of the posterior, their
        expectations are the same: see `calibration_ratio`.
    """
    number = samples.shape[1]
    between = distances(samples, samples).sum(dim=(1, 2)) / (number * (number - 1))
    return between, distances(samples, originals[:, None]).mean(dim=(1, 2))


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


def contrast(original: Tensor, image: Tensor) -> Tensor:
    """Standard deviation of an image's pixel values as a share of its original's.

    Args:
        original: Images in [-1, 1], shape (B, 3, H, W).
        image: Images, same shape.

    Returns:
        float32, 1 where both spread equally, below 1 where the image is duller, shape (B,). The
        spread of an original counts as one 8-bit step at least, so a flat one gives no infinity.
    """
    own, other = (x.float().flatten(1).std(dim=1) / 2 for x in (original, image))  # in 0..1
    return other / own.clamp_min(1 / 255)


def saturated_share(images: Tensor) -> Tensor:
    """Share of the 8-bit values that are 0 or 255: what guidance drives beyond the pixels' range.

    Args:
        images: In [-1, 1], shape (B, 3, H, W).

    Returns:
        float32 in [0, 1], shape (B,).
    """
    values = to_uint8(images).flatten(1)
    return ((values == 0) | (values == 255)).float().mean(dim=1)


def load_lpips() -> PixelMetric:
    """Return LPIPS, the distance in AlexNet's features that people see (Zhang et al. 2018).

    Returns:
        A function of two batches of images (B, 3, H, W) in [-1, 1], whose result is 0 for the same
        ones, shape (B,).

    Raises:
        InputError: torchvision's weights of AlexNet cannot be had.
    """
    try:
        check_download(AlexNet_Weights.IMAGENET1K_V1.url)
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except OSError as error:
        raise InputError(
            f"The weights of LPIPS, torchvision's AlexNet, cannot be had ({error}): expected "
            "lpips=false, or a connection to download them."
        ) from error
    return lambda a, b: network.to(a.device)(a.float(), b.float()).flatten()


def bootstrap_means(
    values: ArrayLike,
    photographs: Sequence[str] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Means over images of resampled photographs (Efron 1979; for clusters, Field & Welsh 2007).

    Crops of a photograph are alike, so intervals from resampled crops would be too narrow: a
    photograph is drawn with all its images or not at all.

    Args:
        values: One row per image, shape (N, M).
        photographs: Which photograph each image shows, shape (N,); None: each one of its own.
        num_resamples: How often as many photographs as there are are drawn with replacement.
        seed: Seed of the resampling. All columns of all calls with one seed see the same draws.

    Returns:
        float64, shape (num_resamples, M).

    Raises:
        InputError: There are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise InputError("A confidence interval needs at least one image, got none.")
    own = np.arange(len(values))
    photograph = own if photographs is None else pd.factorize(np.asarray(photographs))[0]
    number = photograph.max() + 1
    totals = np.zeros((number, values.shape[1] + 1))  # sums of the columns, and the image count
    np.add.at(totals, photograph, np.column_stack([values, np.ones(len(values))]))
    generator = np.random.default_rng(seed)
    blocks = []
    for start in range(0, num_resamples, 100):  # all at once is a gigabyte for 50,000 images
        size = min(100, num_resamples - start)
        times_drawn = generator.multinomial(number, np.full(number, 1 / number), size)
        blocks.append(times_drawn @ totals)
    resampled = np.concatenate(blocks)
    return resampled[:, :-1] / resampled[:, -1:]


def percentile_interval(resampled: np.ndarray, confidence: float = 0.95) -> np.ndarray:
    """Percentile interval of resampled statistics.

    Args:
        resampled: One statistic per resample, shape (num_resamples, ...).
        confidence: Share of them inside the interval, in (0, 1).

    Returns:
        Lower and upper end, shape (2, ...).
    """
    outside = (1 - confidence) / 2
    return np.quantile(resampled, [outside, 1 - outside], axis=0)


def bootstrap_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    photographs: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over images.

    Args:
        values: One number per image, shape (N,).
        confidence: Share of the resampled means inside the interval, in (0, 1).
        num_resamples: How many resampled means are drawn.
        seed: Seed of the resampling.
        photographs: See `bootstrap_means`.

    Returns:
        Lower and upper end, in the unit of the values. Both are the mean itself for one
        photograph, and nan if a value is nan.

    Raises:
        InputError: There are no values.
    """
    values = np.asarray(values, dtype=np.float64)[:, None]
    means = bootstrap_means(values, photographs, num_resamples, seed)[:, 0]
    low, high = percentile_interval(means, confidence)
    return float(low), float(high)


def calibration_ratio(between: ArrayLike, to_original: ArrayLike) -> np.ndarray:
    """Mean distance of two samples over that of a sample to the original.

    1 is calibrated, below 1 overconfident, above 1 too wild. For a Gaussian posterior whose samples
    are drawn c times too far from its mean, it is c / sqrt((1 + c^2) / 2): 0.88 for c = 0.8 and
    1.09 for c = 1.2. A wrong mean lowers it too.

    Args:
        between: From `sample_distances`, a mean over images: the mean of the images' own ratios has
            not the expectation 1. Any shape.
        to_original: Same shape.

    Returns:
        The ratio; nan where both are 0.
    """
    between, to_original = (np.asarray(x, dtype=np.float64) for x in (between, to_original))
    return between / np.where(to_original == 0, np.nan, to_original)


def normalised_cosine(cosine: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> np.ndarray:
    """Put a mean cosine between that of another image (0) and that of the original (1).

    Cosines of different layers and backbones do not compare: some have a floor of 0.6. This does.

    Args:
        cosine: Mean cosine of reconstructions, any shape.
        floor: Mean cosine of other images.
        ceiling: Mean cosine of the originals at the model's resolution.

    Returns:
        (cosine - floor) / (ceiling - floor); nan where ceiling and floor are equal.
    """
    cosine, floor, ceiling = (np.asarray(x, dtype=np.float64) for x in (cosine, floor, ceiling))
    span = ceiling - floor
    return (cosine - floor) / np.where(span == 0, np.nan, span)
