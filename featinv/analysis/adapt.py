"""Adapt: a linear map from a new encoder's features to those that a model was trained with.

With it a model inverts an encoder that it has never seen, after minutes on a few hundred images
instead of a training. The map is one matrix and bias for all positions, the closed-form solution of
ridge regression; its strength is chosen by cross-validation over images.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from featinv.analysis.tensor_files import read_tensors
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
        names = ("encoder", "weight", "bias", "size", "strength")
        found = read_tensors(path, "map", "experiments/adapt.py", names)
        held, weight, bias, size, strength = (found[name] for name in names)
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
    size = tuple(targets.shape[2:])
    rows = resize_maps(features.float(), size).permute(0, 2, 3, 1).flatten(1, 2).double()
    x = F.pad(rows, (1, 0), value=1.0)  # (N, h' w', 1 + C): the first coefficient is the bias
    y = targets.permute(0, 2, 3, 1).flatten(1, 2).double()  # (N, h' w', C')
    # A fold is left out as a whole image, not as a position: neighbours are alike.
    folds = [slice(fold, None, NUM_FOLDS) for fold in range(min(NUM_FOLDS, number))]
    pairs = [(x[fold].flatten(0, 1), y[fold].flatten(0, 1)) for fold in folds]
    grams = torch.stack([a.T @ a for a, _ in pairs])  # (folds, 1 + C, 1 + C)
    moments = torch.stack([a.T @ b for a, b in pairs])  # (folds, 1 + C, C')
    gram, moment = grams.sum(0), moments.sum(0)

    def error(strength: float) -> float:
        """Return the squared error on held-out images."""
        held_out = zip(pairs, grams, moments, strict=True)
        return sum(
            float((a @ _ridge(gram - own, moment - cross, strength) - b).square().sum())
            for (a, b), own, cross in held_out
        )

    best = min(strengths, key=error)
    bias, weight = _ridge(gram, moment, best).float().split([1, rows.shape[2]])
    return AdaptedBackbone(backbone, weight.T, bias[0], size, best)


def _ridge(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """Return the coefficients (1 + C, C') that minimise |x W - y|^2 + penalty |W|^2 without bias.

    Args:
        gram: x^T x, shape (1 + C, 1 + C), where x begins with a 1.
        moment: x^T y, shape (1 + C, C').
        strength: The penalty for each row of x, relative to the mean variance of x.
    """
    number, sums = gram[0, 0], gram[0, 1:]
    variance = (gram.diagonal()[1:] / number - (sums / number).square()).mean()
    penalty = (strength * number * variance.clamp(min=1e-12)).expand(len(gram)).clone()
    penalty[0] = 0  # of the bias
    return torch.linalg.solve(gram + penalty.diag(), moment)


def resize_maps(features: Tensor, size: Sequence[int]) -> Tensor:
    """Resize feature maps; a larger map is averaged where it shrinks."""
    if features.shape[2:] == tuple(size):
        return features
    return F.interpolate(features, tuple(size), mode="bilinear", antialias=True)


def describe_layer(backbone: Backbone) -> str:
    """Return what a map is bound to, in words."""
    return f"{backbone.name}, layer {backbone.layer}, at {backbone.image_size} px"
