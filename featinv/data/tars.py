"""WebDataset tar shards: find them, open paths and URLs, read records."""

import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import urlopen

from braceexpand import braceexpand
from huggingface_hub import HfFileSystem
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys

from featinv.data.base import Broken
from featinv.data.images import decode
from featinv.data.pictures import Picture
from featinv.utils.downloads import PREFIX, out_of_reach, reachable
from featinv.utils.errors import InputError, listing
from featinv.utils.files import describe_folder

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RETRY_PAUSES = (1, 5, None)  # seconds between attempts to open a URL; None gives up


def read_shard(url: str) -> Iterator[dict | Broken]:
    """Yield the undecoded records of a shard; a truncated one ends with a `Broken`.

    Raises:
        InputError: The shard cannot be opened.
    """
    with open_shard(url) as stream:
        try:
            yield from group_by_keys(read_members(stream, url))
        except Exception as error:  # tarfile, zlib and http have no common base class
            yield Broken(url, f"Shard '{url}' is truncated or damaged: {error}.")


def read_members(stream: IO[bytes], url: str) -> Iterator[dict]:
    """Yield the files in a tar, as webdataset's `group_by_keys` takes them.

    Unlike webdataset's own iterator, this detects an archive that ends between two members.
    """
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if member.isreg():
                data = tar.extractfile(member).read()
                yield {"fname": member.name, "data": data, "__url__": url}
            tar.members = []  # or memory would grow with every member
        if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")


def open_shard(url: str) -> IO[bytes]:
    """Open a shard as a stream.

    Raises:
        InputError: It is missing or cannot be read.
    """
    if url.startswith(PREFIX):
        return _open_on_hub(url)
    for pause in RETRY_PAUSES if is_url(url) else (None,):
        try:
            return urlopen(url, timeout=60) if is_url(url) else open(url, "rb")
        except (OSError, HTTPException) as error:
            refused = isinstance(error, HTTPError) and error.code < 500
            if pause is None or refused:
                raise InputError(f"Cannot open shard '{url}': {error}.") from error
            time.sleep(pause)


def _open_on_hub(url: str) -> IO[bytes]:
    if not reachable():
        raise out_of_reach(f"shard '{url}' cannot be opened")
    try:
        # It sends the token that gated data sets need, and retries by itself.
        stream = HfFileSystem().open(url, "rb", block_size=0)
        stream.read(0)  # connects, so that a missing shard does not look like a damaged one
        return stream
    except Exception as error:  # types differ between versions of huggingface_hub
        raise InputError(f"Cannot open shard '{url}': {error}.") from error


def decode_record(
    record: dict | Broken, view: Callable[[Image.Image], Tensor], index: int
) -> dict | Broken:
    """Decode a record into an item of a batch, or return why that fails as a `Broken`."""
    if isinstance(record, Broken):
        return record
    key = record["__key__"]
    name = f"{key} in {record['__url__']}"
    try:
        encoded = next((record[suffix] for suffix in IMAGE_SUFFIXES if suffix in record), None)
        if encoded is None:
            raise InputError(
                f"Sample '{name}' has no image: expected {' or '.join(IMAGE_SUFFIXES)}."
            )
        return Picture(key, parse_label(record, name), decode(encoded, name)).sample(view, index)
    except InputError as error:
        return Broken(key, str(error))


def label_of(record: dict | Broken) -> int | None:
    """Return the class of an undecoded record, -1 if it has none; None if it is broken."""
    try:
        return None if isinstance(record, Broken) else parse_label(record, record["__key__"])
    except InputError:
        return None


def parse_label(record: dict, name: str) -> int:
    """Return the class index that the `cls` member holds, -1 if there is none."""
    text = record.get("cls", b"-1")
    try:
        return int(text)
    except ValueError:
        raise InputError(f"Label of '{name}' is {text[:20]!r}: expected an integer.") from None


def is_url(pattern: str) -> bool:
    """Return whether a pattern is an http(s) URL, or on the Hugging Face hub."""
    return pattern.startswith(("http://", "https://", PREFIX))


def expand_shards(patterns: str | Sequence[str] | None, root: str = "") -> list[str]:
    """Expand braces and globs to a list of shards.

    Args:
        patterns: One pattern, several, or None.
        root: Folder or URL that relative patterns start from.

    Returns:
        Paths and URLs, in the order of the patterns; the matches of a glob are sorted.

    Raises:
        InputError: A pattern of an unsupported kind, or one that matches no file.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    shards = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or ("://" in pattern and not is_url(pattern)):
            raise InputError(
                f"Shards '{pattern}' cannot be read: expected local paths, http(s) or hf:// URLs; "
                "for other stores, download or mount them first."
            )
        names = list(braceexpand(pattern))
        if is_url(pattern) or is_url(root):
            prefix = "" if is_url(pattern) else root.rstrip("/") + "/"
            shards += [prefix + name for name in names]
        else:
            shards += _local_shards(pattern, [str(Path(root, name).expanduser()) for name in names])
    return shards


def _local_shards(pattern: str, paths: list[str]) -> list[str]:
    found = [[path] if Path(path).is_file() else sorted(glob(path)) for path in paths]
    if missing := [path for path, files in zip(paths, found, strict=True) if not files]:
        there = describe_folder(Path(missing[0]).parent)
        raise InputError(
            f"Shards '{pattern}': no file matches {listing(missing, limit=1)}; {there}."
        )
    return list(chain.from_iterable(found))
