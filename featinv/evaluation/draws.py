"""Draw samples from features, and compute the backbone's features and logits of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from featinv.backbones import Backbone
from featinv.metrics import spatial_cosine
from featinv.models.base import Inverter
from featinv.utils.devices import timed
from featinv.utils.pixels import eight_bit, from_uint8, to_uint8

CHUNK = 32  # images per forward pass of the backbone


@dataclass(frozen=True)
class Draws:
    """S samples of each of B conditions; row b S + s is sample s of condition b.

    Args:
        images: In [-1, 1], rounded to 8-bit values, shape (B S, 3, H, W).
        features: Their features in the backbone, shape (B S, C, h, w).
        logits: Their logits, shape (B S, K); `None` for an encoder without classes.
        num_samples: S.
        seconds: Time spent on sampling.
    """

    images: Tensor
    features: Tensor
    logits: Tensor | None
    num_samples: int
    seconds: float

    def repeat(self, values: Tensor) -> Tensor:
        """Repeat one value per condition (B, ...) for each of its samples, (B S, ...)."""
        return values.repeat_interleave(self.num_samples, 0)

    def mean(self, values: Tensor) -> Tensor:
        """Average one value per sample (B S,) over the samples: float32 on the CPU, shape (B,)."""
        return values.float().view(-1, self.num_samples).mean(1).cpu()

    def cosine(self, features: Tensor) -> Tensor:
        """Return the samples' mean spatial cosine to features (B, C, h, w), shape (B,)."""
        return self.mean(spatial_cosine(self.repeat(features), self.features))

    def agreement(self, classes: Tensor) -> Tensor:
        """Return the share of samples classified as the class of their condition (B,), (B,)."""
        return self.mean(self.logits.argmax(1) == self.repeat(classes))

    def probability(self, classes: Tensor) -> Tensor:
        """Return the mean probability of the class of each condition (B,), shape (B,)."""
        return self.mean(self.logits.softmax(1).gather(1, self.repeat(classes)[:, None])[:, 0])

    def first(self) -> Tensor:
        """Return the first sample of each condition: uint8 on the CPU, shape (B, 3, H, W)."""
        return to_uint8(self.images[:: self.num_samples]).cpu()


@torch.no_grad()
def draw(
    model: Inverter,
    condition: Tensor,
    indices: Sequence[int],
    num_samples: int = 1,
    **options: object,
) -> Draws:
    """Draw samples, and compute their features and logits.

    Args:
        model: The model.
        condition: Features to invert, shape (B, C, h, w).
        indices: Index of each condition, shape (B,), which seeds its noise.
        num_samples: Samples of each condition.
        **options: Options of `Inverter.invert`.
    """
    with timed(model.device) as spent:
        drawn = model.invert(condition, num_samples, indices=[int(i) for i in indices], **options)
        images = eight_bit(drawn.flatten(0, 1))
    parts = [model.backbone.features_and_logits(part) for part in images.split(CHUNK)]
    return Draws(images, *_join(parts), num_samples, spent.seconds)


@torch.no_grad()
def extract(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the features and logits of images.

    Args:
        backbone: The backbone.
        images: uint8, shape (N, 3, H, W).

    Returns:
        Features (N, C, h, w) and logits (N, K), on the CPU; logits are `None` without classes.
    """
    device = backbone.device
    with tqdm(images.split(CHUNK), unit="batch", desc="features", leave=False) as chunks:
        parts = [backbone.features_and_logits(from_uint8(chunk.to(device))) for chunk in chunks]
    features, logits = _join(parts)
    return features.cpu(), None if logits is None else logits.cpu()


def _join(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)
