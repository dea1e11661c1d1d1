"""Random transformations of images, so that gradients do not exploit pixel patterns.

A gradient through a classifier finds patterns that it responds to and that mean nothing. They do
not survive small random changes of the image, so the gradient's expectation over such changes
avoids them (Athalye et al. 2018, "Synthesizing robust adversarial examples"; Olah et al. 2017,
"Feature visualization").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# (images (B, C, H, W), noise_level (B,) in [0, 1], one generator for each image) -> images
Transform = Callable[[Tensor, Tensor, Sequence[torch.Generator]], Tensor]


@dataclass(frozen=True)
class PixelNoise:
    """Add Gaussian noise, more of it where the image itself is still uncertain.

    Args:
        high: Standard deviation at noise level 1, in the images' units (their range is 2).
        low: Standard deviation at noise level 0.
    """

    high: float = 0.1
    low: float = 0.01

    def __call__(
        self, images: Tensor, noise_level: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return noisy images, same shape."""
        noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
        std = self.low + (self.high - self.low) * noise_level[:, None, None, None]
        return images + std * noise.to(images)


@dataclass(frozen=True)
class ShiftAndZoom:
    """Shift and zoom each image by a random amount, bilinearly, with its border reflected.

    Args:
        shift: Largest shift in pixels, along both axes.
        zoom: Largest relative change of the scale: 0.03 is 3 % larger or smaller.
    """

    shift: float = 1.5
    zoom: float = 0.03

    def __call__(
        self, images: Tensor, noise_level: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return moved images, same shape; the noise level does not matter."""
        draws = torch.stack([torch.rand(3, generator=g) for g in generators]) * 2 - 1
        draws = draws.to(images)
        scale = 1 + self.zoom * draws[:, 0]
        pixels = torch.tensor([2 / images.shape[-1], 2 / images.shape[-2]]).to(images)
        theta = images.new_zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = self.shift * draws[:, 1:] * pixels  # affine_grid's unit is half a side
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def transform_all(
    transforms: Sequence[Transform],
    images: Tensor,
    noise_level: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Apply transformations one after the other."""
    for transform in transforms:
        images = transform(images, noise_level, generators)
    return images
