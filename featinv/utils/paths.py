"""Paths in a config: update them after its run or the files that it needs have moved."""

import os
import re
from collections.abc import Callable
from pathlib import Path

# Whose values may be paths: of priors, of a backbone's weights, of a codec's basis.
KEYS = ("path", "weights", "basis")


def map_paths(node: object, change: Callable[[str], str], key: str | None = None) -> object:
    """Apply `change` to the values of `KEYS` in a config."""
    if isinstance(node, dict):
        return {name: map_paths(value, change, name) for name, value in node.items()}
    if isinstance(node, list):
        return [map_paths(value, change) for value in node]
    return change(node) if key in KEYS and isinstance(node, str) else node


def relocate(node: object, old: str, new: str) -> object:
    """Replace one folder by another in all paths of a config, whatever their keys."""
    if isinstance(node, dict):
        return {key: relocate(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [relocate(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node


def flatten(node: dict, prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of nested dicts, e.g. `trainer.max_steps`."""
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def find_near(name: str, file: Path) -> str:
    """Return where a path in a file's config is now.

    If it does not exist, the folders above the file are searched for as many of its last parts as
    possible: `outputs/small/prior`, `small/prior`, `prior`. If none is found, the name is returned
    as it is: it may be on a hub.

    Args:
        name: A path, absolute or relative to the working directory.
        file: The file with the config, never returned itself.
    """
    if Path(name).exists():
        return name
    parts = Path(name).parts[Path(name).is_absolute() :]
    for start in range(len(parts)):
        for folder in Path(os.path.abspath(file)).parents:
            found = folder.joinpath(*parts[start:])
            if found.exists() and not found.samefile(file):
                return str(found)
    return name


def hide_folders(text: str) -> str:
    """Shorten absolute paths in a text to their last component, to publish it."""
    return re.sub(r"(?<![\w./:-])[~/][\w./@+-]*/", "", text)
