"""Read untrusted pictures, checking them before they are decoded."""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from featinv.data.images import decode
from featinv.data.photographs import HELD_OUT, load
from featinv.utils.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # their decoders start no other program


class Photo(NamedTuple):
    """A photograph to invert: file name, RGB picture, and SHA-256 of its size and pixels."""

    name: str
    picture: Image.Image
    sha256: str


def read_photo(path: str | Path, name: str, max_megapixels: float) -> Photo:
    """Read an untrusted picture, decoding it only if it is not too large.

    Args:
        path: The file.
        name: Its name in error messages.
        max_megapixels: Maximal number of pixels, in millions.

    Raises:
        InputError: The file is of no format in `FORMATS`, damaged, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit
            with Image.open(path, formats=FORMATS) as header:  # reads the header only
                size = header.size
    except UnidentifiedImageError:
        raise InputError(
            f"'{name}' is not a readable picture: expected a {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]} file."
        ) from None
    except Image.DecompressionBombError:
        size = None
    if size is None or size[0] * size[1] > max_megapixels * 1e6:
        sides = f" ({size[0]} x {size[1]} pixels)" if size else ""
        raise InputError(
            f"'{name}' is too large{sides}: expected at most {max_megapixels:g} megapixels."
        )
    return _photo(name, decode(path, name))


def find_photo(path: str, max_megapixels: float) -> Photo:
    """Return the photograph at a path, or a bundled one by its file name.

    Raises:
        InputError: There is no such photograph, or it cannot be read.
    """
    if Path(path).is_file():
        return read_photo(path, path, max_megapixels)
    if path in HELD_OUT:
        return _photo(path, load(path))
    raise InputError(
        f"There is no image '{path}': expected a file, or one of {', '.join(HELD_OUT)}."
    )


def _photo(name: str, picture: Image.Image) -> Photo:
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes())
    return Photo(name, picture, digest.hexdigest())
