"""Pixels: conversion between 8-bit and [-1, 1] images, and resizing."""

import torch
import torch.nn.functional as F
from torch import Tensor

RESIZES = ("bicubic", "bilinear")


def from_uint8(images: Tensor) -> Tensor:
    """Map 8-bit images, any shape, to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map images, any shape, in [-1, 1] (others are clamped) to the nearest 8-bit values."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def eight_bit(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to what an 8-bit file can hold, still in [-1, 1]."""
    return from_uint8(to_uint8(images))


def resize(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resize images to squares.

    Args:
        images: Shape (B, 3, H, W) in [-1, 1].
        size: Side in pixels.
        mode: `"bicubic"`, with antialiasing; or `"bilinear"`, without, as torchvision before 0.17
            resized tensors, and so the original FeatInv its targets.

    Returns:
        Shape (B, 3, size, size), in [-1, 1].
    """
    if images.shape[-2:] == (size, size):
        return images
    antialias = mode == "bicubic"
    return F.interpolate(images, (size, size), mode=mode, antialias=antialias).clamp(-1, 1)
