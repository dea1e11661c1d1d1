"""Fidelity of reconstructions: pure functions of tensors, and confidence intervals of their means.

Metrics take two batches, the reference first, of features (B, C, h, w) or of images (B, 3, H, W) in
[-1, 1], and return float32 numbers (B,). They compute in float32, whatever the features' precision:
the three digits of bfloat16 are too few to tell two runs apart.
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

NUM_RESAMPLES, CONFIDENCE = 2000, 0.95  # of bootstrap intervals

PixelMetric = Callable[[Tensor, Tensor], Tensor]  # two batches of B images -> (B,)


def spatial_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the channels, averaged over positions; 0 at those where a vector is zero."""
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean(dim=(1, 2))


def pooled_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the spatially averaged features, ignoring positions; 0 where one is zero."""
    return F.cosine_similarity(a.float().mean(dim=(2, 3)), b.float().mean(dim=(2, 3)), dim=1)


def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """Distance relative to the reference, ||b - a|| / ||a||; 0 where both are zero."""
    a, b = a.float().flatten(1), b.float().flatten(1)
    return (b - a).norm(dim=1) / a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def top_k_agreement(logits_a: Tensor, logits_b: Tensor, k: int) -> Tensor:
    """1 where the top class of logits (B, K) is among the top k of others, else 0; any k."""
    best = logits_a.argmax(dim=1, keepdim=True)  # (B, 1)
    top_k = logits_b.topk(min(k, logits_b.shape[1]), dim=1).indices  # (B, k)
    return (top_k == best).any(dim=1).float()


def pixel_spread(samples: Tensor) -> Tensor:
    """Standard deviation of each pixel over the samples: what the classifier threw away.

    Args:
        samples: Images in [-1, 1], shape (B, S, 3, H, W).

    Returns:
        Shape (B, H, W), averaged over the colours, in 0..1 pixel units; zeros for S = 1. It comes
        from the unbiased variance (S - 1), so runs with different numbers of samples compare.
    """
    correction = min(1, samples.shape[1] - 1)
    return (samples.float() / 2).std(dim=1, correction=correction).mean(dim=1)


def rms_distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square differences (B, P, Q) between points (B, P, ...) and points (B, Q, ...)."""
    a, b = a.float().flatten(2), b.float().flatten(2)
    # The faster way, by matrix products, loses its digits where points are close.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[2] ** 0.5


def sample_distances(samples: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """How far an image's samples are from each other, and from the original.

    Args:
        samples: Points in any space, shape (B, S, ...), S at least 2.
        originals: Shape (B, ...).

    Returns:
        Mean RMS distance between two samples, and between a sample and the original, each of shape
        (B,). Their expectations are equal if the samples come from the posterior, since the
        original is then exchangeable with them: see `calibration_ratio`.
    """
    num_samples = samples.shape[1]
    between = rms_distances(samples, samples).sum(dim=(1, 2)) / (num_samples * (num_samples - 1))
    return between, rms_distances(samples, originals[:, None]).mean(dim=(1, 2))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB; at most 100, where equal images would give infinity."""
    ratio = peak_signal_noise_ratio(
        a.float(), b.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=100)


def contrast(original: Tensor, image: Tensor) -> Tensor:
    """Standard deviation of an image's pixels relative to its original's: below 1 is duller.

    A flat original counts as having a deviation of one 8-bit step.
    """
    reference, deviation = (x.float().flatten(1).std(dim=1) for x in (original, image))
    return deviation / reference.clamp_min(2 / 255)


def saturated_share(images: Tensor) -> Tensor:
    """Share of images' 8-bit values that are 0 or 255: guidance drives pixels out of range."""
    values = to_uint8(images).flatten(1)
    return ((values == 0) | (values == 255)).float().mean(dim=1)


def load_lpips() -> PixelMetric:
    """Return LPIPS, a perceptual distance in AlexNet's features (Zhang et al. 2018).

    Returns:
        A function of two batches of images (B, 3, H, W) in [-1, 1], with values of shape (B,), 0
        for identical images.

    Raises:
        InputError: torchvision's AlexNet weights are unavailable.
    """
    try:
        check_download(AlexNet_Weights.IMAGENET1K_V1.url)
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    except OSError as error:
        raise InputError(
            f"The weights of LPIPS, torchvision's AlexNet, are unavailable ({error}): expected "
            "lpips=false, or a connection to download them."
        ) from error
    return lambda a, b: network.to(a.device)(a.float(), b.float()).flatten()


def bootstrap_means(values: ArrayLike, photographs: Sequence[str] | None = None) -> np.ndarray:
    """Bootstrapped means over images (Efron 1979; of clusters, Field and Welsh 2007).

    Photographs are resampled with all their crops: crops of a photograph are alike, so resampling
    them one by one would make intervals too narrow. Every call with the same photographs draws the
    same.

    Args:
        values: One row per image, shape (N, M).
        photographs: The photograph that each image shows, shape (N,); `None`: all differ.

    Returns:
        Shape (NUM_RESAMPLES, M), float64.

    Raises:
        InputError: There are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise InputError("A confidence interval needs at least one image, got none.")
    if photographs is None:
        photographs = range(len(values))
    photograph = pd.factorize(np.asarray(photographs))[0]
    number = photograph.max() + 1
    totals = np.zeros((number, values.shape[1] + 1))  # sums over a photograph, and its image count
    np.add.at(totals, photograph, np.column_stack([values, np.ones(len(values))]))
    generator = np.random.default_rng(0)
    blocks = []
    for _ in range(0, NUM_RESAMPLES, 100):  # in one go, a gigabyte for 50,000 images
        times_drawn = generator.multinomial(number, np.full(number, 1 / number), 100)
        blocks.append(times_drawn @ totals)
    sums = np.concatenate(blocks)
    return sums[:, :-1] / sums[:, -1:]


def percentile_interval(resampled: np.ndarray) -> np.ndarray:
    """Ends (2, ...) of the interval that holds 95% of resampled statistics (NUM_RESAMPLES, ...)."""
    outside = (1 - CONFIDENCE) / 2
    return np.quantile(resampled, [outside, 1 - outside], axis=0)


def bootstrap_interval(
    values: ArrayLike, photographs: Sequence[str] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one number per image; see `bootstrap_means`.

    Returns:
        Lower and upper end: the mean itself for a single photograph, nan if a value is nan.
    """
    means = bootstrap_means(np.asarray(values)[:, None], photographs)[:, 0]
    low, high = percentile_interval(means)
    return float(low), float(high)


def calibration_ratio(between: ArrayLike, to_original: ArrayLike) -> np.ndarray:
    """Mean distance between two samples over that between a sample and the original.

    1 is calibrated, below 1 overconfident, above 1 underconfident. Samples of a Gaussian posterior
    that are c times too far from its mean give c / sqrt((1 + c^2) / 2): 0.88 for c = 0.8, 1.09 for
    c = 1.2. A wrong mean lowers the ratio too.

    Args:
        between: From `sample_distances`, averaged over images (the expectation of an average of
            ratios is not 1); any shape.
        to_original: Same shape.

    Returns:
        The ratio; nan where `to_original` is 0.
    """
    between, to_original = (np.asarray(x, dtype=np.float64) for x in (between, to_original))
    return between / np.where(to_original == 0, np.nan, to_original)


def normalised_cosine(cosine: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> np.ndarray:
    """Rescale a mean cosine so that another image scores 0 and the original scores 1.

    Raw cosines do not compare across layers and backbones: some have a floor of 0.6.

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
