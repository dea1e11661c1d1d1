"""Models that invert: features of a frozen backbone to images."""

from featinv.models.base import Inverter
from featinv.models.decoder import Decoder
from featinv.models.featinv import FeatInv
from featinv.models.pixel_optimization import PixelOptimization

__all__ = ["Decoder", "FeatInv", "Inverter", "PixelOptimization"]
