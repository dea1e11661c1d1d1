"""Effects of an edit: how far the features follow it, and where the image changes."""

import torch.nn.functional as F
from torch import Tensor


def map_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of whole feature maps, flattened to vectors.

    Unlike `featinv.metrics.spatial_cosine`, it ignores positions that an edit has set to zero.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.

    Returns:
        float32 in [-1, 1], shape (B,).
    """
    return F.cosine_similarity(a.float().flatten(1), b.float().flatten(1))


def obtained_share(change: Tensor, wanted: Tensor) -> Tensor:
    """Project the change of features on the wanted change, as a fraction of the latter.

    Args:
        change: Change of the features, shape (B, C, h, w).
        wanted: The change that the edit asks for, same shape.

    Returns:
        Shape (B,): 1 for the whole wanted change, 0 for none of it.
    """
    along = (change * wanted).flatten(1).sum(dim=1)
    return along / wanted.square().flatten(1).sum(dim=1).clamp(min=1e-12)


def locality(change: Tensor, where: Tensor) -> Tensor:
    """Mean change of the pixels under the edited positions over that of all other pixels.

    Args:
        change: Change of each pixel, shape (B, H, W).
        where: Edited positions of the feature map, bool, shape (B, h, w).

    Returns:
        Shape (B,): 1 if the image changes equally everywhere.
    """
    inside = F.interpolate(where[:, None].float(), change.shape[1:], mode="nearest-exact")[:, 0]

    def mean(weight: Tensor) -> Tensor:
        return (weight * change).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)

    return mean(inside) / mean(1 - inside).clamp(min=1e-6)
