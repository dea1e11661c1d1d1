"""Pure edits of feature maps: pool, steer, mix, splice, swap and replace."""

from collections.abc import Sequence

import torch
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
    """Attenuate or amplify one concept, and leave the rest of the features as it is.

    Features are taken as a sum of concepts, each a direction times its presence at a position
    (`featinv.analysis.concepts`): f' = f + (factor - 1) presence direction.

    Args:
        features: Shape (B, C, h, w).
        presence: Of the concept, shape (B, h, w).
        direction: The concept, shape (C,).
        factor: 0 removes it, 1 changes nothing, 2 doubles it.
        mask: Where to, bool or a weight in [0, 1], shape (h, w) or (B, h, w); `None`: everywhere.

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
        weight: 0 is a, 1 is b; beyond lies further on.
        path: `"linear"`, or `"spherical"`: at every position the direction goes along the great
            circle (Shoemake 1985) and the length linearly, so that mixtures are as long as features
            are. Where directions are parallel or opposite, it is linear.

    Raises:
        InputError: Unknown path, or other shapes.
    """
    _check_same(a, b)
    if path not in PATHS:
        raise unknown("path of a mixture", path, PATHS)
    straight = torch.lerp(a, b, weight)
    if path == "linear":
        return straight
    length_a, length_b = (x.norm(dim=1, keepdim=True) for x in (a, b))
    cosine = (a * b).sum(dim=1, keepdim=True) / (length_a * length_b).clamp(min=1e-12)
    angle = cosine.clamp(-1, 1).acos()  # (B, 1, h, w)
    sine = angle.sin()
    curved = (
        ((1 - weight) * angle).sin() * a / length_a.clamp(min=1e-12)
        + (weight * angle).sin() * b / length_b.clamp(min=1e-12)
    ) / sine.clamp(min=1e-12)
    turns = (sine > 1e-4) & (length_a > 0) & (length_b > 0)
    return torch.where(turns, torch.lerp(length_a, length_b, weight) * curved, straight)


def splice(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Take b where the mask is, and a elsewhere.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.
        mask: bool, shape (h, w) or (B, h, w), e.g. from `half`.

    Raises:
        InputError: Other shapes.
    """
    _check_same(a, b)
    return torch.where(mask.expand(len(a), *a.shape[2:])[:, None], b, a)


def half(size: tuple[int, int], side: str) -> Tensor:
    """Return the mask (h, w) of one half of a map: `left`, `right`, `top` or `bottom`.

    Of an odd number of columns or rows, the middle one belongs to neither.

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


def swap_channels(a: Tensor, b: Tensor, channels: Sequence[int]) -> Tensor:
    """Return a with some channels of b.

    Args:
        a: Features, shape (B, C, h, w).
        b: Features, same shape.
        channels: Which ones.

    Raises:
        InputError: Other shapes, or there is no such channel.
    """
    _check_same(a, b)
    channels = _checked(channels, a.shape[1], "channel")
    swapped = a.clone()
    swapped[:, channels] = b[:, channels]
    return swapped


def replace(
    features: Tensor,
    value: float = 0.0,
    channels: Sequence[int] | None = None,
    positions: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Set single features to a value.

    Args:
        features: Shape (B, C, h, w).
        value: What to.
        channels: Which channels; `None`: all of them.
        positions: At which (row, column); `None`: at all of them. One channel at one position is a
            single unit.

    Raises:
        InputError: There is no such channel or position.
    """
    _, num_channels, height, width = features.shape
    where = torch.zeros(num_channels, height, width, dtype=torch.bool, device=features.device)
    chosen = range(num_channels) if channels is None else channels
    chosen = _checked(chosen, num_channels, "channel")
    if positions is None:
        where[chosen] = True
    else:
        for row, column in positions:
            (row,), (column,) = _checked([row], height, "row"), _checked([column], width, "column")
            where[chosen, row, column] = True
    return features.masked_fill(where, value)


def strongest_channels(features: Tensor, number: int) -> Tensor:
    """Return where the channels of the largest mean magnitude are, image by image.

    Args:
        features: Shape (B, C, h, w).
        number: How many channels of each image.

    Returns:
        bool, same shape; for `Tensor.masked_fill`.
    """
    strongest = features.abs().mean(dim=(2, 3)).topk(number).indices  # (B, number)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    return mask.scatter(1, strongest, True)[:, :, None, None].expand_as(features)


def strongest_unit(features: Tensor) -> Tensor:
    """Return where the largest magnitude is, one channel at one position of each image.

    Args:
        features: Shape (B, C, h, w).

    Returns:
        bool, same shape.
    """
    mask = torch.zeros(features.shape, dtype=torch.bool, device=features.device).flatten(1)
    largest = features.abs().flatten(1).argmax(dim=1, keepdim=True)
    return mask.scatter(1, largest, True).view_as(features)


def _check_same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"The features have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same: "
            "those of one backbone and layer."
        )


def _checked(numbers: Sequence[int], size: int, name: str) -> list[int]:
    for number in numbers:
        if not 0 <= number < size:
            raise InputError(f"There is no {name} {number}: expected 0 to {size - 1}.")
    return list(numbers)
