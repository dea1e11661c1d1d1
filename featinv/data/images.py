"""Images of any format to square RGB pixels: decode, crop, flip."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, resized_crop

from featinv.utils.errors import InputError

INTERPOLATIONS = ("bicubic", "bilinear")  # Pillow's: antialiased


def decode(
    source: bytes | str | Path,
    name: str | None = None,
    formats: Sequence[str] | None = None,
    max_megapixels: float | None = None,
) -> Image.Image:
    """Decode a picture of any format to 8-bit RGB.

    Transparent pixels become white, 16-bit grey is scaled (not clipped) to 8 bit, and the EXIF
    orientation is applied.

    Args:
        source: The encoded bytes, or the file that holds them.
        name: Of the picture in errors; by default the file's path.
        formats: Pillow's names of the formats to accept, e.g. `"JPEG"`; `None`: all.
        max_megapixels: Largest picture to decode, in millions of pixels, below Pillow's own limit.

    Returns:
        Pillow image, mode RGB, at least 1x1.

    Raises:
        InputError: The bytes are empty, truncated, no picture of these formats, or too large.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and of broken EXIF
            file = BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=formats) as image:  # reads no more than the header
                width, height = image.size
                if max_megapixels is not None and width * height > max_megapixels * 1e6:
                    raise ValueError(
                        f"it has {width} x {height} pixels: expected at most {max_megapixels:g} "
                        "megapixels"
                    )
                image.load()
                return _to_rgb(_upright(image))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        kinds = "a known" if formats is None else ", ".join(formats)
        what = "it is empty" if source == b"" else f"it is not a picture in {kinds} format"
        raise InputError(f"Cannot decode picture '{name}': {what}.") from error
    except Exception as error:  # Pillow's decoders raise almost any type
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"Cannot decode picture '{name}': {reason}.") from error


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a picture with broken EXIF is still a picture
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bit: convert() would clip at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def random_box(
    image: Image.Image, generator: torch.Generator, min_scale: float
) -> tuple[int, int, int, int]:
    """Draw the box of torchvision's `RandomResizedCrop` (Szegedy et al. 2015).

    It keeps at least `min_scale`, in (0, 1], of the picture's area. Returns top, left, height and
    width in pixels.
    """
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.set_rng_state(generator.get_state())
        box = RandomResizedCrop.get_params(image, [min_scale, 1], [3 / 4, 4 / 3])
        generator.set_state(torch.get_rng_state())
    return box


def train_view(
    image: Image.Image,
    generator: torch.Generator,
    size: int,
    min_scale: float = 0.08,
    vertical_flip: bool = False,
    interpolation: str = "bicubic",
) -> Tensor:
    """Crop at random, resize, and flip each way with probability 1/2.

    Args:
        image: RGB picture of any size.
        generator: Source of all draws.
        size: Side of the result in pixels.
        min_scale: Minimal share of the picture's area that is kept, in (0, 1].
        vertical_flip: Whether to flip upside down too, as in the paper's recipe.
        interpolation: One of `INTERPOLATIONS`; the paper's recipe is bilinear.

    Returns:
        uint8 tensor in [0, 255], shape (3, size, size).
    """
    box = random_box(image, generator, min_scale)
    crop = resized_crop(image, *box, [size, size], InterpolationMode(interpolation))
    view = pil_to_tensor(crop)  # (3, size, size)
    left_right, up_down = (torch.rand(2, generator=generator) < 0.5).tolist()
    axes = [2] * left_right + [1] * (up_down and vertical_flip)
    return view.flip(axes) if axes else view


def eval_view(image: Image.Image, size: int, interpolation: str = "bicubic") -> Tensor:
    """Resize the shorter side to `size` and crop the centre, as torchvision's transforms do.

    Args:
        image: RGB picture of any size; a smaller one is enlarged.
        size: Side of the result in pixels.
        interpolation: One of `INTERPOLATIONS`; the paper's protocol is bilinear.

    Returns:
        uint8 tensor in [0, 255], shape (3, size, size).
    """
    resized = resize(image, size, InterpolationMode(interpolation))
    return pil_to_tensor(center_crop(resized, size))
