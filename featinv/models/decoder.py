"""Decoder: the feed-forward way to invert features, to compare with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from featinv.extractors import FeatureExtractor
from featinv.models.trainable import TrainableInverter
from featinv.utils.errors import InputError
from featinv.utils.pixels import from_uint8, resize

START_SIZE = 8  # side of the map from which the up-convolutions start


@dataclass(frozen=True)
class FeedForward:
    """How a `Decoder` draws: in one pass, with nothing to choose."""

    def describe(self) -> str:
        """Return the settings in words."""
        return "feed-forward"


class Decoder(TrainableInverter):
    """An up-convolutional network from features to the image (Dosovitskiy and Brox 2016).

    Trained by the squared error in pixels (their Eq. 2), it draws the mean of all images that have
    the features: blurred, without samples. Three convolutions, then up-convolutions with stride 2
    and leaky ReLUs, as in the paper; the kernels are 3x3 and 4x4, and the map is resized to 8x8
    first, for any backbone and any image size that is 8 times a power of two.

    Args:
        backbone: See `TrainableInverter`, also for other arguments that are not here.
        channels: Width of the first layers; each up-convolution halves it.
        seed: Not used: nothing is random but the data.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        image_size: int,
        conditioning: str = "spatial",
        channels: int = 256,
        optimizer: Callable[[Iterable[Parameter]], Optimizer] = torch.optim.AdamW,
        lr_schedule: str = "constant_with_warmup",
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        if len(backbone.layers) > 1:
            raise InputError(
                f"A decoder inverts one layer, but backbone.layer is [{', '.join(backbone.layers)}]"
                ": expected one of them."
            )
        super().__init__(
            backbone, image_size, conditioning, optimizer, lr_schedule, warmup_steps, seed
        )
        doublings = log2(image_size / START_SIZE) if image_size >= START_SIZE else -1.0
        if not doublings.is_integer() or doublings < 0:
            raise InputError(
                f"The image size is {image_size}, expected {START_SIZE} times a power of two for a "
                "decoder, for example 128."
            )
        self.decoder = _make_decoder(backbone.feature_shape[0], channels, int(doublings))
        self.freeze()

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained, by their names in the state dict."""
        return nn.ModuleDict({"decoder": self.decoder})

    def losses(self, images: Tensor) -> Tensor:
        """Return the squared error of each image's reconstruction, shape (B,).

        Args:
            images: Shape (B, 3, H, W) in [-1, 1].
        """
        with torch.no_grad():
            condition = self.condition(self.backbone.features(images))
        error = self._decode(condition).float() - resize(images, self.image_size)
        return error.square().mean(dim=(1, 2, 3))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.losses(from_uint8(batch["image"])).mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Compute the loss."""
        self._val_losses.append(self.losses(from_uint8(batch["image"])))

    def settings(self, **options: object) -> FeedForward:
        """Return the settings; a decoder has no options.

        Raises:
            InputError: There are options.
        """
        if options:
            raise InputError(
                f"A feed-forward decoder has no sampler, but {', '.join(options)} was given: "
                "expected none of them."
            )
        return FeedForward()

    def draw(
        self,
        condition: Tensor,
        layer: str,
        settings: FeedForward,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Draw an image for each condition; see `Inverter.draw`."""
        return self._decode(condition).clamp(-1, 1)

    def _decode(self, condition: Tensor) -> Tensor:
        size = (START_SIZE, START_SIZE)
        return self.decoder(F.interpolate(condition, size, mode="bilinear", align_corners=False))


def _make_decoder(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in in (in_channels, channels, channels):
        layers += [nn.Conv2d(width_in, channels, 3, padding=1), nn.LeakyReLU(0.2)]
    for _ in range(doublings):
        halved = max(16, channels // 2)
        layers += [nn.ConvTranspose2d(channels, halved, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = halved
    return nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1))
