"""Pixels: 8-bit and [-1, 1] images, and their sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """Map 8-bit images, any shape, to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map images, any shape, in [-1, 1] (values beyond are clamped) to the nearest 8-bit values."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def eight_bit(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to what an 8-bit file can hold, still in [-1, 1]."""
    return from_uint8(to_uint8(images))


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images (B, 3, H, W) in [-1, 1] to (B, 3, size, size), bicubic with antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
