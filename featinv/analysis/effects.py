"""What an edit of features does: how far the features go its way, and where the image changes."""

import torch.nn.functional as F
from torch import Tensor


def map_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of whole feature maps.

    `featinv.metrics.spatial_cosine` counts a position that was set to zero as a failure, whatever
    is drawn.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.

    Returns:
        float32 in [-1, 1], shape (B,).
    """
    return F.cosine_similarity(a.float().flatten(1), b.float().flatten(1))


def obtained_share(change: Tensor, wanted: Tensor) -> Tensor:
    """How far features went in the wanted direction, as a share of the wanted change.

    Args:
        change: Of the features, shape (B, C, h, w).
        wanted: Same shape.

    Returns:
        1 where they went all the way, 0 where they went elsewhere or nowhere, shape (B,).
    """
    along = (change * wanted).flatten(1).sum(dim=1)
    return along / wanted.square().flatten(1).sum(dim=1).clamp(min=1e-12)


def locality(change: Tensor, where: Tensor) -> Tensor:
    """Mean change inside the positions' part of the image over that outside.

    Args:
        change: Of the pixels, shape (B, H, W).
        where: Positions of a feature map, bool, shape (B, h, w).

    Returns:
        1 where the change is the same everywhere, shape (B,).
    """
    inside = F.interpolate(where[:, None].float(), change.shape[1:], mode="nearest-exact")[:, 0]

    def mean(weight: Tensor) -> Tensor:
        return (weight * change).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)

    return mean(inside) / mean(1 - inside).clamp(min=1e-6)
