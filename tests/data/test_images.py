"""Decoding odd pictures, and crops that depend on their generator alone."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    PILToTensor,
    Resize,
)
from torchvision.transforms.functional import hflip, vflip

from data.conftest import jpeg
from featinv.data.images import decode, eval_view, random_box, train_view
from featinv.utils.errors import InputError
from featinv.utils.seeding import make_generator


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, at=(0, 0)) -> tuple[int, int, int]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_modes_become_rgb():
    assert pixel(encode(Image.new("L", (3, 2), 90))) == (90, 90, 90)
    assert pixel(encode(Image.new("1", (3, 2), 1))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGB", (1, 1), (9, 8, 7)))) == (9, 8, 7)
    assert pixel(encode(Image.new("RGB", (3, 2), "red").quantize(4))) == (255, 0, 0)
    red = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(red, (255, 0, 0), atol=3)


def test_transparent_pixels_become_white():
    assert pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)
    np.testing.assert_allclose(
        pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))), (255, 127, 127), atol=1
    )
    assert pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    assert pixel(encode(palette, transparency=0)) == (255, 255, 255)
    assert pixel(encode(palette)) == (0, 0, 255)


def test_sixteen_bit_is_scaled_not_clipped():
    ramp = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode(encode(Image.fromarray(ramp), kind))
        assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 8), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show it
    assert decode(encode(image, "JPEG", exif=exif)).size == (8, 16)
    assert decode(encode(image, "JPEG", exif=b"Exif\x00\x00garbage")).size == (16, 8)


def test_errors_name_the_picture():
    whole = jpeg(0, size=(64, 64))
    for data in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(InputError, match="'shot'"):
            decode(data, "shot")
    with pytest.raises(InputError, match="absent.jpg"):
        decode("absent.jpg")
    floats = encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(InputError, match="floating-point"):
        decode(floats, "shot")


def test_a_decompression_bomb_is_an_error():
    body = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    bomb = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"
    with pytest.raises(InputError, match="'bomb': .* exceeds limit of 178956970 pixels"):
        decode(bomb, "bomb")


def test_train_view_depends_on_its_generator_alone():
    image = decode(jpeg(1, (60, 50)))
    torch.manual_seed(0)
    first = train_view(image, make_generator(5, 1), 16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, train_view(image, make_generator(5, 1), 16))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, train_view(image, make_generator(5, 2), 16))
    assert (first.dtype, first.shape) == (torch.uint8, (3, 16, 16))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_match_torchvision(interpolation):
    """Bilinear, the default there, is what the original code uses."""
    given = {} if interpolation == "bilinear" else {"interpolation": InterpolationMode.BICUBIC}
    noise = np.random.default_rng(0).integers(0, 255, (71, 100, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise).rotate(90, expand=True)):
        protocol = Compose([Resize(32, **given), CenterCrop(32), PILToTensor()])
        assert torch.equal(eval_view(image, 32, interpolation), protocol(image))
        for seed in range(5):
            view = train_view(image, make_generator(seed), 32, 0.3, True, interpolation)
            top, left, height, width = random_box(image, make_generator(seed), 0.3)
            crop = image.crop((left, top, left + width, top + height))
            crop = PILToTensor()(Resize([32, 32], **given)(crop))
            flips = [crop, hflip(crop), vflip(crop), hflip(vflip(crop))]
            assert sum(torch.equal(view, flip) for flip in flips) == 1


def test_each_flip_has_probability_one_half():
    image = decode(encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)))
    views = [
        train_view(image, make_generator(i), 8, min_scale=1, vertical_flip=True).float()
        for i in range(200)
    ]
    mirrored = sum(bool(v[0, :, 0].mean() > v[0, :, -1].mean()) for v in views)
    overturned = sum(bool(v[0, 0].mean() > v[0, -1].mean()) for v in views)
    assert 70 < mirrored < 130
    assert 70 < overturned < 130
