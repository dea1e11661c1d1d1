"""FeatureEncoder, and the ControlNet that it feeds."""

from collections.abc import Mapping
from math import ceil

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn


class FeatureEncoder(nn.Module):
    """Maps a feature map to the first activations of a ControlNet (Neukirch et al. 2025).

    Bilinear resizing to the latents' size, two 3x3 convolutions with SiLU, and a 3x3
    convolution that starts at zero, so that training starts from the unconditional model
    (Zhang et al. 2023). It stands in the place of the ControlNet's image encoder.

    Args:
        feature_channels: Channels C of the features.
        out_channels: Channels of the ControlNet's first convolution.
        latent_size: Height and width of the latents.
        hidden_channels: Width of the two hidden layers; the paper has 512.
        fold: Features are resized to so many times the latents' size, and each fold x fold block
            of positions becomes one position of fold^2 as many channels: a map that is larger than
            the latents' loses nothing. 1 is the paper's.
    """

    def __init__(
        self,
        feature_channels: int,
        out_channels: int,
        latent_size: tuple[int, int],
        hidden_channels: int = 512,
        fold: int = 1,
    ) -> None:
        super().__init__()
        self.latent_size = tuple(latent_size)
        self.fold = fold
        self.conv_in = nn.Conv2d(feature_channels * fold**2, hidden_channels, 3, padding=1)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Encode features (B, C, h, w) to (B, out_channels, *latent_size)."""
        size = [side * self.fold for side in self.latent_size]
        x = F.interpolate(features, size, mode="bilinear", align_corners=False)
        x = F.pixel_unshuffle(x, self.fold)  # (B, C fold^2, *latent_size)
        x = F.silu(self.conv_in(x))
        x = F.silu(self.conv_mid(x))
        return self.conv_out(x)


class FeatureEncoders(nn.ModuleList):
    """A `FeatureEncoder` for each of a backbone's layers, all feeding one ControlNet.

    The encoders' own biases tell the ControlNet which layer the features are of.

    Args:
        feature_shapes: Layer -> (C, h, w).
        out_channels, latent_size, hidden_channels: As for `FeatureEncoder`.
        fold_features: Fold maps that are larger than the latents' (`FeatureEncoder`'s `fold`).
    """

    def __init__(
        self,
        feature_shapes: Mapping[str, tuple[int, int, int]],
        out_channels: int,
        latent_size: tuple[int, int],
        hidden_channels: int = 512,
        fold_features: bool = False,
    ) -> None:
        folds = [
            max(1, ceil(h / latent_size[0]), ceil(w / latent_size[1])) if fold_features else 1
            for _, h, w in feature_shapes.values()
        ]
        super().__init__(
            FeatureEncoder(channels, out_channels, latent_size, hidden_channels, fold)
            for (channels, _, _), fold in zip(feature_shapes.values(), folds, strict=True)
        )
        self.layers = tuple(feature_shapes)

    def forward(self, features: Tensor, layer: str) -> Tensor:
        """Encode features (B, C, h, w) of a layer to (B, out_channels, *latent_size)."""
        return self[self.layers.index(layer)](features)

    def of_each(self, features: Mapping[str, Tensor], layers: Tensor) -> Tensor:
        """Encode one layer of each image: only the rows that are asked for.

        Args:
            features: Layer -> (B, C, h, w).
            layers: Number of each image's layer, int64, shape (B,), on the CPU.

        Returns:
            Shape (B, out_channels, *latent_size).
        """
        device = features[self.layers[0]].device
        parts, rows = [], []
        for number, layer in enumerate(self.layers):
            own = (layers == number).nonzero()[:, 0].to(device, non_blocking=True)
            # DDP waits for a gradient of each parameter, so the encoder of a layer that no image
            # has runs on one of them, and its result is left out.
            maps = features[layer][own] if len(own) else features[layer][:1]
            parts.append(self(maps, layer)[: len(own)])
            rows.append(own)
        return torch.cat(parts)[torch.cat(rows).argsort()]


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Copy a UNet's encoder to a ControlNet whose condition is encoded features.

    Args:
        unet: The (frozen or trained) UNet; its weights are the starting point.

    Returns:
        A ControlNet that takes the output of a `FeatureEncoder` as `controlnet_cond`: features are
        encoded once for a whole draw, not at each denoising step.
    """
    controlnet = ControlNetModel.from_unet(unet)
    controlnet.controlnet_cond_embedding = nn.Identity()
    return controlnet
