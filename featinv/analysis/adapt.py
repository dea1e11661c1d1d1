"""Adapt: a linear map from a new encoder's features to those that a model was trained with.

With it a model inverts an encoder that it has never seen, after minutes on a few hundred images
instead of a training. The map is one matrix and bias for all positions, the closed-form solution of
ridge regression; its strength is chosen by cross-validation over images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featinv.backbones import Backbone
from featinv.utils.errors import InputError

STRENGTHS = tuple(10.0**exponent for exponent in range(-7, 4))
NUM_FOLDS = 5


class AdaptedBackbone(nn.Module):
    """An encoder whose features are mapped to those of another.

    `model.invert(adapted.features(images))` draws images from what the encoder sees of them.

    Args:
        backbone: The new encoder.
        weight: Shape (C', C), from the encoder's C channels to C'.
        bias: Shape (C',).
        size: (h', w') of the maps to make.
        strength: Of the ridge penalty, relative to the mean variance of the new features.
    """

    def __init__(
        self,
        backbone: Backbone,
        weight: Tensor,
        bias: Tensor,
        size: tuple[int, int],
        strength: float,
    ) -> None:
        super().__init__()
        self.backbone, self.size, self.strength = backbone, tuple(size), strength
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.to(backbone.mean.device)

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, C', h', w') for the model to invert; images as for `Backbone`."""
        return self.adapt(self.backbone.features(images))

    def adapt(self, features: Tensor) -> Tensor:
        """Map the encoder's features (B, C, h, w) to (B, C', h', w')."""
        resized = resize_maps(features.float(), self.size)
        return F.conv2d(resized, self.weight[:, :, None, None], self.bias)

    def save(self, path: str | Path) -> None:
        """Write the map, without the encoder's weights, to a `.safetensors` file."""
        tensors = {
            "weight": self.weight.contiguous(),
            "bias": self.bias.contiguous(),
            "size": torch.tensor(self.size),
            "strength": torch.tensor(self.strength, dtype=torch.float64),
        }
        save_file(tensors, str(path), {"encoder": describe_layer(self.backbone)})

    @staticmethod
    def load(path: str | Path, backbone: Backbone) -> "AdaptedBackbone":
        """Read what `save` wrote.

        Args:
            path: The file.
            backbone: The encoder that the map was fitted to.

        Raises:
            InputError: The file is missing or something else, or was fitted to another encoder.
        """
        try:
            with safe_open(path, framework="pt") as file:
                held = file.metadata()["encoder"]
                names = ("weight", "bias", "size", "strength")
                weight, bias, size, strength = (file.get_tensor(name) for name in names)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"The map '{path}' cannot be read ({type(error).__name__}: {error}); expected a "
                "file that experiments/adapt.py wrote."
            ) from error
        if held != describe_layer(backbone):
            raise InputError(
                f"The map '{path}' was fitted to {held}, but the encoder at hand is "
                f"{describe_layer(backbone)}: expected the same."
            )
        return AdaptedBackbone(backbone, weight, bias, tuple(size.tolist()), float(strength))


def fit_adapter(
    backbone: Backbone,
    features: Tensor,
    targets: Tensor,
    strengths: Sequence[float] = STRENGTHS,
) -> AdaptedBackbone:
    """Fit the map from a new encoder's features of some images to a model's features of the same.

    Args:
        backbone: The new encoder.
        features: Its features, shape (N, C, h, w).
        targets: What the model was trained with, shape (N, C', h', w').
        strengths: Of the penalty, to choose from, relative to the mean variance of `features`.

    Raises:
        InputError: Fewer than two images, or not as many features as targets.
    """
    number = len(features)
    if number < 2 or number != len(targets):
        raise InputError(
            f"There are features of {number} images and of {len(targets)}: expected the same two "
            "or more."
        )
    size = targets.shape[2:]
    x = resize_maps(features.float(), size).permute(0, 2, 3, 1).flatten(1, 2).double()
    y = targets.permute(0, 2, 3, 1).flatten(1, 2).double()  # (N, h' w', C')
    # A fold is left out as a whole image, not as a position: neighbours are alike.
    folds = [slice(fold, None, NUM_FOLDS) for fold in range(min(NUM_FOLDS, number))]
    parts = [_moments(x[fold].flatten(0, 1), y[fold].flatten(0, 1)) for fold in folds]
    everything = _add(parts)
    errors = [0.0] * len(strengths)
    for held_out in parts:
        rest = _add([part for part in parts if part is not held_out])
        for i, (weight, bias) in enumerate(_ridge(rest, strengths)):
            errors[i] += _squared_error(held_out, weight, bias)
    best = strengths[min(range(len(strengths)), key=errors.__getitem__)]
    ((weight, bias),) = _ridge(everything, [best])
    return AdaptedBackbone(backbone, weight.T.float(), bias.float(), tuple(size), best)


def resize_maps(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize feature maps; a larger map is averaged where it shrinks."""
    if features.shape[2:] == tuple(size):
        return features
    return F.interpolate(features, tuple(size), mode="bilinear", antialias=True)


class _Moments(NamedTuple):
    """Sums over positions that least squares need: all is in them, whatever is left out."""

    number: int
    x: Tensor  # (C,)
    y: Tensor  # (C',)
    xx: Tensor  # (C, C)
    xy: Tensor  # (C, C')
    yy: Tensor  # sum of squares


def _moments(x: Tensor, y: Tensor) -> _Moments:
    return _Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())


def _add(parts: list[_Moments]) -> _Moments:
    return _Moments(*map(sum, zip(*parts, strict=True)))


def _ridge(moments: _Moments, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Return weight (C, C') and bias (C',) for each strength, from one decomposition.

    W = (S_xx + strength mean(diag S_xx) I)^-1 S_xy with the covariances S of centred features.
    """
    mean_x, mean_y = moments.x / moments.number, moments.y / moments.number
    s_xx = moments.xx / moments.number - mean_x.outer(mean_x)
    s_xy = moments.xy / moments.number - mean_x.outer(mean_y)
    values, vectors = torch.linalg.eigh(s_xx)
    values = values.clamp(min=0)
    rotated = vectors.T @ s_xy
    solutions = []
    for strength in strengths:
        penalty = strength * values.mean().clamp(min=1e-12)
        weight = vectors @ (rotated / (values + penalty)[:, None])
        solutions.append((weight, mean_y - mean_x @ weight))
    return solutions


def _squared_error(moments: _Moments, weight: Tensor, bias: Tensor) -> float:
    """Return the sum of |y - x W - b|^2 over all positions of the moments."""
    error = (
        moments.yy
        - 2 * (weight * moments.xy).sum()
        - 2 * bias @ moments.y
        + (weight * (moments.xx @ weight)).sum()
        + 2 * bias @ (moments.x @ weight)
        + moments.number * bias @ bias
    )
    return float(error)


def describe_layer(backbone: Backbone) -> str:
    """Return what a map is bound to, in words."""
    return f"{backbone.name}, layer {backbone.layer}, at {backbone.image_size} px"
