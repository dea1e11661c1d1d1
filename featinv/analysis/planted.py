"""Planted truths: backbones that keep and discard known parts of an image.

An inverter that samples the posterior keeps what they keep and varies what they discard, so its
samples can be checked against the truth, which no real network allows.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.codecs import PatchPCA
from featinv.extractors import FeatureExtractor
from featinv.utils.errors import multiple_of, unknown
from featinv.utils.pixels import resize

BLOCK = 8  # pixels a side of one position: 16 x 16 positions at 128 px
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Planted(FeatureExtractor):
    """A frozen map from images to features, without classes.

    Images with the same `kept` part have the same features, whatever their
    `discarded` part. For all but `Mirror`, the two parts add up to the image, and

        features(x + discarded(y)) = features(x).

    Args:
        image_size: Side in pixels of the view; features have image_size / 8 positions a side.

    Raises:
        InputError: The side is not a multiple of 16.
    """

    channels: int

    def __init__(self, image_size: int = 128) -> None:
        super().__init__()
        why = "two halves of whole blocks"
        self.image_size = multiple_of("backbone.image_size", image_size, 2 * BLOCK, why)
        side = image_size // BLOCK
        self.feature_shapes = {self.layer: (self.channels, side, side)}

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) in [-1, 1] to (B, 3, image_size, image_size)."""
        return resize(images.float(), self.image_size)

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """Return features (B, C, h, w) of order 1, of images (B, 3, H, W) in [-1, 1]."""
        self._one_of_layers(layer)
        return self._map(self.preprocess(images))

    @abstractmethod
    def _map(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, image_size, image_size)."""

    @abstractmethod
    def kept(self, images: Tensor) -> Tensor:
        """Return the part that the features determine, shape (B, 3, image_size, image_size)."""

    def discarded(self, images: Tensor) -> Tensor:
        """Return the part that they leave open, shape (B, 3, image_size, image_size)."""
        return self.preprocess(images) - self.kept(images)


class Luminance(Planted):
    """Keeps the luminance of each pixel, discards colour.

    The 64 channels hold the luminance (ITU-R BT.601) of an 8x8 block.
    """

    name, channels = "luminance", BLOCK**2

    def __init__(self, image_size: int = 128) -> None:
        super().__init__(image_size)
        self.register_buffer("weights", torch.tensor(LUMINANCE).view(1, 3, 1, 1))

    def _map(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(self._luminance(images), BLOCK)

    def _luminance(self, images: Tensor) -> Tensor:
        return (self.weights * images).sum(dim=1, keepdim=True)

    def kept(self, images: Tensor) -> Tensor:
        """Return the image in shades of grey."""
        return self._luminance(self.preprocess(images)).repeat(1, 3, 1, 1)


class LowPass(Planted):
    """Keeps the mean colour of each 8x8 block, discards detail."""

    name, channels = "low_pass", 3

    def _map(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, BLOCK)

    def kept(self, images: Tensor) -> Tensor:
        """Return the image in 8x8 blocks of one colour."""
        return _as_blocks(self.features(images))


class Blind(LowPass):
    """Keeps what `LowPass` keeps, except in the lower right quadrant, where features are zero."""

    name = "blind"

    def __init__(self, image_size: int = 128) -> None:
        super().__init__(image_size)
        side = image_size // BLOCK
        seen = torch.ones(1, 1, side, side)
        seen[:, :, side // 2 :, side // 2 :] = 0
        self.register_buffer("seen", seen)

    def _map(self, images: Tensor) -> Tensor:
        return super()._map(images) * self.seen


class Linear(Planted):
    """Keeps a fixed random projection of each 8x8 block's principal components.

    Features: W z, with the coefficients z of the block in the codec `PatchPCA` and random
    orthonormal rows W, always the same. They determine the projection W^T W z.

    Args:
        image_size: As for `Planted`.
        num_components: Principal components of a block.
    """

    name, channels = "linear", 16

    def __init__(self, image_size: int = 128, num_components: int = 48) -> None:
        super().__init__(image_size)
        self.codec = PatchPCA(num_components)
        generator = torch.Generator().manual_seed(0)
        columns = torch.randn(num_components, self.channels, generator=generator)
        rows = torch.linalg.qr(columns.double()).Q.T.float()
        self.register_buffer("projection", rows[:, :, None, None].contiguous())

    def _map(self, images: Tensor) -> Tensor:
        return F.conv2d(self.codec.encode(images), self.projection)

    def kept(self, images: Tensor) -> Tensor:
        """Return the image decoded from the projected coefficients."""
        return self.codec.decode(F.conv_transpose2d(self.features(images), self.projection))


class Mirror(Planted):
    r"""Keeps the pair of an image and its mirror image, discards which of the two it is.

    Let c be the mean colours of the image's 8x8 blocks, and c' those of its mirror image. The
    features are m(c) + m(c'), where m(c) consists of c, the six products of its channels, and the
    products of each channel with itself one block to the right and one block below. In terms of the
    even part e = (c + c') / 2 and the odd part d = (c - c') / 2,

        m(c)_{pq} + m(c')_{pq} = 2 (e_p e_q + d_p d_q),

    which determines e, and d up to its sign if it has no zeros: two modes. Detail within blocks is
    discarded too, as by `LowPass`.
    """

    name, channels = "mirror", 15

    def _map(self, images: Tensor) -> Tensor:
        colours = F.avg_pool2d(images, BLOCK)
        return _products(colours) + _products(colours.flip(3))

    def kept(self, images: Tensor) -> Tensor:
        """Return the features: no single image shows the pair."""
        return self.features(images)

    def discarded(self, images: Tensor) -> Tensor:
        """Return the odd part d as an image; only its sign is discarded."""
        colours = F.avg_pool2d(self.preprocess(images), BLOCK)
        return _as_blocks((colours - colours.flip(3)) / 2)

    def mode(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return where images (B, 3, H, W) lie between the modes of originals (B, 3, H, W).

        Returns:
            <d, d_o> / |d_o|^2, shape (B,): 1 for the original, -1 for its mirror image, 0 for a
            symmetric image.
        """
        odd, original = (self.discarded(x).flatten(1) for x in (images, originals))
        return (odd * original).sum(dim=1) / original.square().sum(dim=1).clamp(min=1e-12)


TRUTHS = {truth.name: truth for truth in (Luminance, LowPass, Blind, Mirror, Linear)}


def load_planted(name: str, image_size: int = 128) -> Planted:
    """Return the planted truth called `name`, a key of `TRUTHS`.

    Raises:
        InputError: Unknown name, or invalid size.
    """
    if name not in TRUTHS:
        raise unknown("planted truth", name, TRUTHS)
    return TRUTHS[name](image_size)


def kept_error(truth: Planted, samples: Tensor, originals: Tensor, others: Tensor) -> Tensor:
    """Return how far the samples' `kept` part is from that of the original.

    Args:
        truth: The planted truth whose features were inverted.
        samples: Shape (B, S, 3, H, W) in [-1, 1].
        originals: Shape (B, 3, H, W).
        others: Another image for each original, shape (B, 3, H, W).

    Returns:
        Root mean square distance over the samples, relative to the distance of the other image,
        shape (B,): 0 is perfect, 1 is chance.
    """
    kept = truth.kept(originals).flatten(1)
    drawn = truth.kept(samples.flatten(0, 1)).flatten(1).unflatten(0, samples.shape[:2])
    distance = (drawn - kept[:, None]).square().sum(dim=2).mean(dim=1).sqrt()
    return distance / (truth.kept(others).flatten(1) - kept).norm(dim=1).clamp(min=1e-12)


def _products(colours: Tensor) -> Tensor:
    """Return m(c) of `Mirror`, shape (B, 15, h, w), for mean colours c (B, 3, h, w)."""
    same = colours[:, [0, 1, 2, 0, 0, 1]] * colours[:, [0, 1, 2, 1, 2, 2]]
    right = F.pad(colours, (0, 1, 0, 0), mode="replicate")[:, :, :, 1:]
    below = F.pad(colours, (0, 0, 0, 1), mode="replicate")[:, :, 1:]
    return torch.cat([colours, same, colours * right, colours * below], dim=1)


def _as_blocks(colours: Tensor) -> Tensor:
    """Return the image whose 8x8 blocks have the given colours (B, 3, h, w)."""
    return F.interpolate(colours, scale_factor=BLOCK, mode="nearest")
