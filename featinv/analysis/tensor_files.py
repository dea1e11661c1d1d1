"""Tensor files: what an analysis has fitted, read back from a `.safetensors` file."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from featinv.utils.errors import InputError


def read_tensors(
    path: str | Path, what: str, writer: str, names: Sequence[str]
) -> dict[str, Tensor | str]:
    """Return the tensors and the metadata of a file by their names.

    Args:
        path: The file.
        what: It holds, for errors, e.g. `"concepts"`.
        writer: What writes such files, for errors.
        names: Of tensors and metadata that it must have.

    Raises:
        InputError: The file is missing, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            found = {key: file.get_tensor(key) for key in keys} | (file.metadata() or {})
        reason = ", ".join(name for name in names if name not in found)
        reason = reason and f"it has no {reason}"
    except (OSError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise InputError(
            f"The {what} '{path}' cannot be read ({reason}); expected a file that {writer} wrote."
        )
    return found
