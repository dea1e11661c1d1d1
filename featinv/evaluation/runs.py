"""Runs side by side: where they are, and what differs between their configs."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from featinv.checkpoints import relocate
from featinv.utils.errors import InputError

# Parts of a config that say where a run is and who hears of it, not what it computes.
ELSEWHERE = ("output", "resume", "logger")


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Return the folders of the runs that are, or lie in, the given folders.

    Raises:
        InputError: There is none in one of them.
    """
    runs: dict[Path, None] = {}  # each once, in order
    for path in map(Path, paths):
        # Hydra and W&B keep configs of their own in a run's folder
        found = {
            file.parent
            for file in path.rglob("config.yaml")
            if not {".hydra", "wandb"} & set(file.relative_to(path).parts)
        }
        if not found:
            raise InputError(
                f"There is no run in '{path}': expected the folder of a run of train.py, with its "
                "config.yaml, or a folder with such folders in it."
            )
        runs |= dict.fromkeys(sorted(found))
    return list(runs)


def load_config(folder: Path) -> dict[str, object]:
    """Return the values of a run's config by their dotted keys, without where the run is.

    Raises:
        InputError: It is no config of a run.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config = relocate(config, config["output"], "OUTPUT")
        return flatten({key: value for key, value in config.items() if key not in ELSEWHERE})
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"'{folder / 'config.yaml'}' is not the config of a run: expected one that train.py "
            "wrote."
        ) from error


def flatten(node: dict, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dicts by their dotted keys."""
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(configs: Sequence[dict[str, object]]) -> dict[str, list[str]]:
    """Return key -> its value in each config, as text, for the keys that differ.

    A config holds some values twice: `seed` is `model.seed` too. The shorter key stands for both.
    Where a part is of another class in some runs, its `_target_` stands for all values that those
    lack and that are the same in the others.

    Args:
        configs: Each as `load_config` returns it.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    columns = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(column)) > 1}

    def repeated(key: str) -> bool:
        parts = key.split(".")
        suffixes = [".".join(parts[i:]) for i in range(1, len(parts))]
        return any(columns.get(suffix) == columns[key] for suffix in suffixes)

    def told_by_class(key: str) -> bool:
        if all(key in config for config in configs):
            return False
        parts = key.split(".")
        targets = (".".join([*parts[:i], "_target_"]) for i in range(1, len(parts)))
        classes = [columns[target] for target in targets if target in columns]
        return any(len({*zip(own, columns[key], strict=True)}) == len({*own}) for own in classes)

    return {
        key: column
        for key, column in columns.items()
        if not repeated(key) and not told_by_class(key)
    }
