"""Cache tensors in a file, together with the settings they depend on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from featinv.utils.errors import InputError
from featinv.utils.tensor_files import save_tensors


def load_or_make(
    path: Path, wanted: Mapping, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Load tensors from a file, or compute them and write the file.

    Args:
        path: The `.safetensors` file.
        wanted: The settings that the tensors depend on, as JSON values.
        make: Computes the tensors.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        InputError: The file was written with other settings.
    """
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            check_settings(path, json.loads(file.metadata()["depends_on"]), wanted)
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    return save_tensors(path, make(), {"depends_on": json.dumps(wanted)})


def check_settings(path: Path, kept: Mapping, wanted: Mapping) -> None:
    """Raise an `InputError` if a file was made with settings other than those wanted."""
    for key, value in json.loads(json.dumps(wanted)).items():
        if kept.get(key) != value:
            raise InputError(
                f"'{path}' was made with {key}={kept.get(key)}, not {value}: expected another "
                "folder, or the same settings."
            )
