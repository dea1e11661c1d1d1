import struct
import zlib

import pytest
from PIL import Image

from featinv.explorer.photos import find_photo, read_photo
from featinv.utils.errors import InputError


def test_unusable_pictures(files, tmp_path):
    (tmp_path / "noise.png").write_bytes(bytes(range(256)))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("noise.png", "empty.jpg", "page.eps"):
        with pytest.raises(InputError, match=f"'{name}' is not a picture that can be read"):
            read_photo(tmp_path / name, name, 50)
    whole = files["second"].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="Cannot decode picture 'cut.png'"):
        read_photo(tmp_path / "cut.png", "cut.png", 50)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((4000, 3000), r"'large.png' is too large \(4000 x 3000 pixels\): expected at most 10 meg"),
        ((20000, 20000), "'large.png' is too large: expected at most 10 megapixels"),  # a bomb
    ],
)
def test_a_large_picture_is_refused_by_its_header(tmp_path, size, sentence):
    header = b"IHDR" + struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT")
    with pytest.raises(InputError, match=sentence):
        read_photo(tmp_path / "large.png", "large.png", 10)


def test_pictures_are_known_by_their_pixels(files, photos, tmp_path):
    with Image.open(files["image"]) as picture:
        picture.save(tmp_path / "copy.png")
    assert find_photo(str(tmp_path / "copy.png"), 50).sha256 == photos[0].sha256
    assert photos[0].sha256 != photos[1].sha256


def test_bundled_photographs_are_found_by_name():
    assert find_photo("chelsea.png", 50).picture.size == (451, 300)
    with pytest.raises(InputError, match="There is no image 'chelsae.png': expected a file, or"):
        find_photo("chelsae.png", 50)
