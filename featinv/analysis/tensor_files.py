"""Read the `.safetensors` files in which analyses save what they have fitted."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from featinv.utils.errors import InputError


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
