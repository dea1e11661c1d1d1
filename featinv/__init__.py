"""FeatInv: from the feature maps of a frozen image classifier back to images."""

from featinv.models import FeatInv
from featinv.utils.errors import InputError

__all__ = ["FeatInv", "InputError"]
