"""Files of tensors: write and read `.safetensors`, read state dicts of either kind."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from featinv.utils.errors import InputError
from featinv.utils.files import atomic_write


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Write a `.safetensors` file atomically, with metadata; return the tensors, on the CPU.

    Raises:
        InputError: The file cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(tensors, about))
    return tensors


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file or one of `torch.save`, without running code of a pickle."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    mmap = zipfile.is_zipfile(path)  # some files have several gigabytes
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_tensors(
    path: str | Path, what: str, writer: str, names: Sequence[str]
) -> dict[str, Tensor | str]:
    """Return the tensors and the metadata of a file, by name.

    Args:
        path: The file.
        what: What it holds, for error messages, e.g. `"concepts"`.
        writer: What writes such files, for error messages.
        names: Tensors and metadata that the file must have.

    Raises:
        InputError: The file cannot be read, or lacks one of `names`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            found = {key: file.get_tensor(key) for key in keys} | (file.metadata() or {})
        missing = [name for name in names if name not in found]
        problem = f"it has no {', '.join(missing)}" if missing else ""
    except (OSError, SafetensorError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise InputError(
            f"The {what} '{path}' cannot be read ({problem}); expected a file that {writer} wrote."
        )
    return found
