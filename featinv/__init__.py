"""FeatInv: from the feature maps of a frozen image classifier back to images."""

from featinv.errors import InputError
from featinv.module import FeatInv

__all__ = ["FeatInv", "InputError"]
