"""Files: write them atomically, hash them, describe what a folder holds."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from featinv.utils.errors import InputError, listing


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is complete; its folder is created.

    Raises:
        InputError: The file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave an empty file
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write '{path}': {error.strerror or error}; expected a writable folder with "
            "free space (an older file there is unchanged)."
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_folder(path: Path) -> str:
    """Return what a folder holds, or its nearest existing parent."""
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    held = listing(sorted(entry.name for entry in folder.iterdir()))
    what = "folder" if folder == path else "the nearest existing folder,"
    return f"{what} '{folder}' holds {held}"
