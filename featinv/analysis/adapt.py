"""Adapt: a linear map from a new encoder's features to those that a model was trained to invert.

With it, a model inverts an encoder that it has never seen, after minutes on a few hundred images
and without any training. All positions share one matrix and bias, fitted by ridge regression whose
penalty is chosen by cross-validation over images.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featinv.backbones import Backbone
from featinv.utils.errors import InputError
from featinv.utils.tensor_files import read_tensors, save_tensors

STRENGTHS = tuple(10.0**exponent for exponent in range(-7, 4))
NUM_FOLDS = 5


class AdaptedBackbone(nn.Module):
    """An encoder followed by a linear map to the features that a model inverts.

    `model.invert(adapted.features(images))` draws images from the encoder's features of them.

    Args:
        backbone: The new encoder.
        weight: Shape (C', C), from the encoder's C channels to the model's C'.
        bias: Shape (C',).
        size: (h', w') of the model's feature maps.
        strength: Ridge penalty that was chosen, relative to the mean variance of the new features.
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
        self.to(backbone.device)

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, C', h', w') to invert, of images (B, 3, H, W) in [-1, 1]."""
        return self.adapt(self.backbone.features(images))

    def adapt(self, features: Tensor) -> Tensor:
        """Map the encoder's features (B, C, h, w) to (B, C', h', w')."""
        resized = F.interpolate(features.float(), self.size, mode="bilinear", antialias=True)
        return F.conv2d(resized, self.weight[:, :, None, None], self.bias)

    def save(self, path: str | Path) -> None:
        """Write the map to a `.safetensors` file, without the encoder's weights."""
        tensors = {
            "weight": self.weight,
            "bias": self.bias,
            "size": torch.tensor(self.size),
            "strength": torch.tensor(self.strength, dtype=torch.float64),
        }
        save_tensors(path, tensors, {"encoder": describe_layer(self.backbone)})

    @staticmethod
    def load(path: str | Path, backbone: Backbone) -> "AdaptedBackbone":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            backbone: The encoder that the map was fitted to.

        Raises:
            InputError: The file cannot be read, or its map was fitted to another encoder.
        """
        names = ("encoder", "weight", "bias", "size", "strength")
        found = read_tensors(path, "map", "experiments/adapt.py", names)
        encoder, weight, bias, size, strength = (found[name] for name in names)
        if encoder != describe_layer(backbone):
            raise InputError(
                f"The map '{path}' was fitted to {encoder}: expected one that was fitted to "
                f"{describe_layer(backbone)}."
            )
        return AdaptedBackbone(backbone, weight, bias, tuple(size.tolist()), float(strength))


def fit_adapter(
    backbone: Backbone,
    features: Tensor,
    targets: Tensor,
    strengths: Sequence[float] = STRENGTHS,
) -> AdaptedBackbone:
    """Fit the map between two encoders' features of the same images.

    Args:
        backbone: The new encoder.
        features: Its features, shape (N, C, h, w).
        targets: Features of the encoder that the model inverts, shape (N, C', h', w').
        strengths: Ridge penalties to choose from, relative to the mean variance of `features`.

    Raises:
        InputError: Fewer than two images, or different numbers of features and targets.
    """
    number = len(features)
    if number < 2 or number != len(targets):
        raise InputError(
            f"Got features of {number} image{'' if number == 1 else 's'} and targets of "
            f"{len(targets)}: expected the same number, at least 2."
        )
    size = tuple(targets.shape[2:])
    resized = F.interpolate(features.float(), size, mode="bilinear", antialias=True)
    rows = resized.permute(0, 2, 3, 1).flatten(1, 2).double()
    x = F.pad(rows, (1, 0), value=1.0)  # (N, h' w', 1 + C): the first coefficient is the bias
    y = targets.permute(0, 2, 3, 1).flatten(1, 2).double()  # (N, h' w', C')
    # Folds hold whole images: positions of one image are alike.
    folds = [slice(fold, None, NUM_FOLDS) for fold in range(min(NUM_FOLDS, number))]
    pairs = [(x[fold].flatten(0, 1), y[fold].flatten(0, 1)) for fold in folds]
    grams = torch.stack([a.T @ a for a, _ in pairs])  # (folds, 1 + C, 1 + C)
    moments = torch.stack([a.T @ b for a, b in pairs])  # (folds, 1 + C, C')
    gram, moment = grams.sum(0), moments.sum(0)

    def error(strength: float) -> float:
        """Return the squared error on held-out images."""
        return sum(
            float((a @ _ridge(gram - own, moment - cross, strength) - b).square().sum())
            for (a, b), own, cross in zip(pairs, grams, moments, strict=True)
        )

    best = min(strengths, key=error)
    bias, weight = _ridge(gram, moment, best).float().split([1, rows.shape[2]])
    return AdaptedBackbone(backbone, weight.T, bias[0], size, best)


def _ridge(gram: Tensor, moment: Tensor, strength: float) -> Tensor:
    """Return the coefficients W (1 + C, C') that minimise |x W - y|^2 + penalty |W|^2.

    Args:
        gram: x^T x, shape (1 + C, 1 + C). The first column of x is 1; its coefficient, the bias,
            is not penalised.
        moment: x^T y, shape (1 + C, C').
        strength: Penalty per row of x, relative to the mean variance of x.
    """
    number, sums = gram[0, 0], gram[0, 1:]
    variance = (gram.diagonal()[1:] / number - (sums / number).square()).mean()
    penalty = (strength * number * variance.clamp(min=1e-12)).expand(len(gram)).clone()
    penalty[0] = 0
    return torch.linalg.solve(gram + penalty.diag(), moment)


def describe_layer(backbone: Backbone) -> str:
    """Name the encoder, layer and image size that a map belongs to."""
    return f"{backbone.name}, layer {backbone.layer}, at {backbone.image_size} px"
