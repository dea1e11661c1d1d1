"""Inputs of the explorer: untrusted pictures, checked before they are decoded, and settings."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featinv.data.images import decode
from featinv.data.photographs import HELD_OUT, load
from featinv.utils.errors import InputError, at_least

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # their decoders start no other program
MAX_SAMPLES = 16
MAX_FACTOR = 2.0


class Photo(NamedTuple):
    """A photograph to invert: file name, RGB picture, and SHA-256 of its size and pixels."""

    name: str
    picture: Image.Image
    sha256: str


def read_photo(path: str | Path, name: str, max_megapixels: float) -> Photo:
    """Read an untrusted picture.

    Args:
        path: The file.
        name: Its name in error messages.
        max_megapixels: Largest picture to decode, in millions of pixels.

    Raises:
        InputError: The file is of no format in `FORMATS`, damaged, or too large.
    """
    return _photo(name, decode(path, name, FORMATS, max_megapixels))


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


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on except its model, concepts and images.

    Args:
        seed: Seed of the noise.
        num_samples: Number of reconstructions, 1 to `MAX_SAMPLES`.
        sampler: Values that replace those of the model's sampler, by name.
        factors: Steered concept -> factor in [0, `MAX_FACTOR`]; 0 removes it, 1 changes nothing.
        weight: Weight of the second image in a mixture, in [0, 1].
        path: Path of a mixture, see `featinv.analysis.edits.mix`.
        layer: Layer of the backbone to invert; `None`: the model's default.
        precision: Precision to draw in: `"32-true"` or `"bf16-mixed"`.

    Raises:
        InputError: A value out of range.
    """

    seed: int = 0
    num_samples: int = 4
    sampler: dict[str, object] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    weight: float = 0.5
    path: str = "linear"
    layer: str | None = None
    precision: str = "32-true"

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        if at_least("num_samples", self.num_samples, 1) > MAX_SAMPLES:
            raise InputError(f"num_samples is {self.num_samples}, expected 1 to {MAX_SAMPLES}.")
        if not 0 <= self.weight <= 1:
            raise InputError(f"The weight of the second image is {self.weight}, expected 0 to 1.")
        for concept, factor in self.factors.items():
            if not 0 <= factor <= MAX_FACTOR:
                raise InputError(
                    f"The factor of concept {concept} is {factor}, expected 0 to {MAX_FACTOR:g}."
                )
