import torch
import torch.nn.functional as F

from featinv.utils.pixels import from_uint8, resize, to_uint8


def test_bytes_round_trip_and_are_nearest():
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every_byte)), every_byte)

    images = torch.linspace(-1.5, 1.5, 1001)
    pixels = ((images + 1) / 2).clamp(0, 1) * 255
    assert (to_uint8(images) - pixels).abs().max() <= 0.5 + 1e-4
    assert to_uint8(images).dtype == torch.uint8


def test_resize_averages_when_shrinking_and_keeps_the_range():
    board = torch.ones(1, 3, 64, 64)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    small = resize(board, 16)
    assert small.abs().max() < 0.2  # a plain subsampling would give -1 or 1
    step = F.pad(torch.ones(1, 3, 32, 16), (16, 0), value=-1)
    assert resize(step, 64).abs().max() <= 1  # bicubic overshoots are clamped


def test_resize_leaves_images_of_the_right_size_alone():
    images = torch.rand(2, 3, 8, 8)
    assert resize(images, 8) is images
