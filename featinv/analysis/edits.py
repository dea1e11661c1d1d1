"""Edits of feature maps: steer, mix and splice; masks of their parts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.utils.errors import InputError, unknown

PATHS = ("linear", "spherical")


def steer(
    features: Tensor,
    presence: Tensor,
    direction: Tensor,
    factor: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attenuate or amplify one concept: f' = f + (factor - 1) presence direction.

    Args:
        features: Shape (B, C, h, w).
        presence: How much of the concept each position holds (`featinv.analysis.concepts`), shape
            (B, h, w).
        direction: The concept, shape (C,).
        factor: 0 removes it, 1 changes nothing, 2 doubles it.
        mask: Where to edit: bool or weights in [0, 1], shape (h, w) or (B, h, w); `None`:
            everywhere.

    Returns:
        Features, same shape.
    """
    change = (factor - 1) * presence
    if mask is not None:
        change = change * mask
    return features + change[:, None] * direction[:, None, None]


def mix(a: Tensor, b: Tensor, weight: float, path: str = "linear") -> Tensor:
    """Return a point between two feature maps.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.
        weight: 0 gives a, 1 gives b; values outside extrapolate.
        path: `"linear"`, or `"spherical"`: at each position the direction follows the great circle
            (Shoemake 1985) and the norm is interpolated, so mixtures have the norm of features.
            Parallel or opposite vectors are mixed linearly.

    Raises:
        InputError: Unknown path, or shapes that differ.
    """
    _check_same_shape(a, b)
    if path not in PATHS:
        raise unknown("path of a mixture", path, PATHS)
    straight = torch.lerp(a, b, weight)
    if path == "linear":
        return straight
    unit_a, unit_b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    angle = (unit_a * unit_b).sum(dim=1, keepdim=True).clamp(-1, 1).acos()  # (B, 1, h, w)
    sine = angle.sin()
    arc = ((1 - weight) * angle).sin() * unit_a + (weight * angle).sin() * unit_b
    norm_a, norm_b = (x.norm(dim=1, keepdim=True) for x in (a, b))
    curved = torch.lerp(norm_a, norm_b, weight) * arc / sine.clamp(min=1e-12)
    has_angle = (sine > 1e-4) & (norm_a > 0) & (norm_b > 0)
    return torch.where(has_angle, curved, straight)


def splice(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Take b where the mask is true, and a elsewhere.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.
        mask: bool, broadcast to their shape: (h, w), e.g. from `half`, or (C, 1, 1) for channels;
            on any device.

    Raises:
        InputError: The shapes of a and b differ.
    """
    _check_same_shape(a, b)
    return torch.where(mask.to(a.device), b, a)


def half(size: tuple[int, int], side: str) -> Tensor:
    """Return the mask (h, w) of one half of a map: `left`, `right`, `top` or `bottom`.

    The middle column or row of an odd number belongs to neither half.

    Raises:
        InputError: Unknown side.
    """
    sides = ("left", "right", "top", "bottom")
    if side not in sides:
        raise unknown("side", side, sides)
    mask = torch.zeros(size, dtype=torch.bool)
    view = mask if side in ("top", "bottom") else mask.T
    middle = len(view) // 2
    rows = slice(None, middle) if side in ("left", "top") else slice(len(view) - middle, None)
    view[rows] = True
    return mask


def strongest_channels(features: Tensor, number: int) -> Tensor:
    """Mask each image's channels of the largest mean magnitude.

    Args:
        features: Shape (B, C, h, w).
        number: Channels per image.

    Returns:
        bool, same shape.
    """
    strongest = features.abs().mean(dim=(2, 3)).topk(number).indices  # (B, number)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    return mask.scatter(1, strongest, True)[:, :, None, None].expand_as(features)


def strongest_unit(features: Tensor) -> Tensor:
    """Mask the unit of the largest magnitude in each image: one channel at one position.

    Args:
        features: Shape (B, C, h, w).

    Returns:
        bool, same shape.
    """
    magnitudes = features.abs().flatten(1)
    largest = magnitudes.argmax(dim=1, keepdim=True)
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    return mask.scatter(1, largest, True).view_as(features)


def _check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"The features have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same, "
            "from one backbone and layer."
        )
