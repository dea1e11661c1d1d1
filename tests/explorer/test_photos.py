import struct
import zlib

import pytest
from PIL import Image

from featinv.explorer.inputs import find_photo, read_photo
from featinv.utils.errors import InputError


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG file of some size."""
    chunk = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    size, checksum = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + size + chunk + checksum + b"\0\0\0\0IDAT"


def test_unusable_pictures(files, tmp_path):
    whole = files["second"].read_bytes()
    for content, sentence in (
        (bytes(range(256)), "'x.png': it is not a picture in JPEG, PNG"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            "'x.png': it is not a picture in JPEG, PNG",
        ),
        (whole[: len(whole) // 2], "Cannot decode picture 'x.png'"),
        (header(4000, 3000), "it has 4000 x 3000 pixels: expected at most 10 megapixels"),
        (header(20000, 20000), "'x.png': Image size .* exceeds limit"),  # a bomb
    ):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            read_photo(tmp_path / "x.png", "x.png", 10)


def test_pictures_are_identified_by_their_pixels(files, photos, tmp_path):
    with Image.open(files["image"]) as picture:
        picture.save(tmp_path / "copy.png")
    assert find_photo(str(tmp_path / "copy.png"), 50).sha256 == photos[0].sha256
    assert photos[0].sha256 != photos[1].sha256


def test_bundled_photographs_are_found_by_name():
    assert find_photo("chelsea.png", 50).picture.size == (451, 300)
    with pytest.raises(InputError, match="There is no image 'chelsae.png': expected a file, or"):
        find_photo("chelsae.png", 50)
