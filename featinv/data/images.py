"""Image files of any kind to square RGB pixels: decode, crop, flip."""

import math
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from featinv.utils.errors import InputError

MAX_PIXELS = 178_956_970  # what Pillow itself takes for a decompression bomb
ASPECT_RATIOS = (3 / 4, 4 / 3)


def decode(source: bytes | str | Path, name: str | None = None) -> Image.Image:
    """Decode a picture of any kind to 8-bit RGB, upright.

    Transparent pixels are laid on white, 16-bit grey is scaled (not clipped) to 8 bit, and the EXIF
    orientation is applied.

    Args:
        source: The encoded bytes, or the file that holds them.
        name: How errors call the picture; a file's own path unless told.

    Returns:
        Pillow image, mode RGB, at least 1x1.

    Raises:
        InputError: The bytes are empty, cut off or no picture, or there are more than `MAX_PIXELS`.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are judged below; broken EXIF harms nobody
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                image.load()
                return _to_rgb(_upright(image))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"Picture '{name}' is too large ({error}): at most {MAX_PIXELS} pixels are decoded."
        ) from error
    except UnidentifiedImageError as error:
        what = "it is empty" if source == b"" else "it is of no known kind"
        raise InputError(f"Cannot decode picture '{name}': {what}.") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"Cannot decode picture '{name}': {reason}.") from error


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a picture with broken EXIF is still a picture
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range, save it with 8 or 16 bit")
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def random_box(
    width: int, height: int, generator: torch.Generator, min_scale: float
) -> tuple[int, int, int, int]:
    """Draw the box of a `RandomResizedCrop` (Szegedy et al. 2015), as torchvision does.

    Args:
        width: Width of the picture in pixels.
        height: Its height.
        generator: All draws come from it.
        min_scale: Least share of the picture's area, in (0, 1].

    Returns:
        Left, upper, right and lower edge in pixels; the aspect ratio lies in 3/4 to 4/3 unless ten
        draws found no such box inside the picture.
    """
    low, high = map(math.log, ASPECT_RATIOS)
    for _ in range(10):
        scale, ratio, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (min_scale + (1 - min_scale) * scale)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    return _central_box(width, height)


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _pixels(image: Image.Image, size: int, box: tuple[int, int, int, int]) -> Tensor:
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)  # Pillow antialiases
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()  # (3, size, size)


def train_view(
    image: Image.Image,
    generator: torch.Generator,
    size: int,
    min_scale: float = 0.08,
    vertical_flip: bool = False,
) -> Tensor:
    """Crop at random, resize, and flip each way with probability 1/2.

    Args:
        image: RGB picture of any size.
        generator: All draws come from it, so that a view depends on the sample's number alone.
        size: Side of the result in pixels.
        min_scale: Least share of the picture's area that is kept, in (0, 1].
        vertical_flip: Whether to flip upside down too, as the paper's recipe does.

    Returns:
        uint8 tensor in [0, 255], shape (3, size, size).
    """
    view = _pixels(image, size, random_box(*image.size, generator, min_scale))
    mirror, overturn = (torch.rand(2, generator=generator) < 0.5).tolist()
    axes = [2] * mirror + [1] * (overturn and vertical_flip)
    return view.flip(axes) if axes else view


def eval_view(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size` and crop the centre, in one bicubic step.

    Args:
        image: RGB picture of any size; a smaller one is enlarged.
        size: Side of the result in pixels.

    Returns:
        uint8 tensor in [0, 255], shape (3, size, size).
    """
    return _pixels(image, size, _central_box(*image.size))
