import pytest
import torch

from featinv.transforms import PixelNoise, ShiftAndZoom, transform_all
from featinv.utils.seeding import make_generator

LEVEL = torch.tensor([0.0, 1.0])


def generators() -> list[torch.Generator]:
    return [make_generator(5, i) for i in range(2)]


def test_noise_grows_with_the_noise_level():
    images = torch.zeros(2, 3, 64, 64)
    noisy = PixelNoise(high=0.2, low=0.02)(images, LEVEL, generators())
    assert noisy.std(dim=(1, 2, 3)).tolist() == pytest.approx([0.02, 0.2], rel=0.05)


def test_a_whole_shift_moves_whole_pixels():
    """The draws of a stand-in generator are known: no zoom, one pixel right, two down."""
    images = torch.rand(1, 3, 8, 8, generator=make_generator(0))
    move = ShiftAndZoom(shift=2.0, zoom=0.5)
    draws = torch.tensor([0.5, 0.75, 1.0])  # uniform in [0, 1): 0, 1/2 and 1 after scaling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *args, **kwargs: draws)
        moved = move(images, LEVEL[:1], generators()[:1])
    torch.testing.assert_close(moved[..., :6, :7], images[..., 2:, 1:])


def test_nothing_moves_at_zero():
    images = torch.rand(2, 3, 9, 7, generator=make_generator(0))
    torch.testing.assert_close(ShiftAndZoom(0.0, 0.0)(images, LEVEL, generators()), images)


def test_an_image_is_transformed_by_its_own_generator_only():
    images = torch.rand(2, 3, 8, 8, generator=make_generator(0))
    transforms = [ShiftAndZoom(), PixelNoise()]
    together = transform_all(transforms, images, LEVEL, generators())
    alone = transform_all(transforms, images[1:], LEVEL[1:], generators()[1:])
    torch.testing.assert_close(alone, together[1:])
