"""Pure edits of feature maps."""

from torch import Tensor


def pool(features: Tensor) -> Tensor:
    """Replace every position by the average over all positions, shape (B, C, h, w) kept."""
    return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
