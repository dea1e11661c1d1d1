"""Cache tensors in a file, together with the settings they depend on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from featinv.utils.errors import InputError
from featinv.utils.files import atomic_write


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
    tensors = {name: value.detach().cpu().contiguous() for name, value in make().items()}
    with atomic_write(path) as file:
        file.write(save(tensors, {"depends_on": json.dumps(wanted)}))
    return tensors


def check_settings(path: Path, kept: Mapping, wanted: Mapping) -> None:
    """Raise an `InputError` if a file was made with settings other than those wanted."""
    for key, value in json.loads(json.dumps(wanted)).items():
        if kept.get(key) != value:
            raise InputError(
                f"'{path}' was made with {key}={kept.get(key)}, not {value}: expected another "
                "folder, or the same settings."
            )
