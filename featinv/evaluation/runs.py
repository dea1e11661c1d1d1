"""Find runs, and what differs between their configs."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from featinv.checkpoints import relocate
from featinv.utils.errors import InputError
from featinv.utils.paths import flatten

# Parts of a config that do not affect the results
NOT_COMPARED = ("output", "resume", "logger")


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Return the folders of all runs at or below the given paths, each once.

    Raises:
        InputError: One of the paths holds no run.
    """
    runs: dict[Path, None] = {}  # an ordered set
    for path in map(Path, paths):
        # Hydra and W&B keep configs of their own in a run's folder.
        found = {
            file.parent
            for file in path.rglob("config.yaml")
            if not {".hydra", "wandb"} & set(file.relative_to(path).parts)
        }
        if not found:
            raise InputError(
                f"There is no run in '{path}': expected the folder of a run of train.py, with its "
                "config.yaml, or a folder of such folders."
            )
        runs |= dict.fromkeys(sorted(found))
    return list(runs)


def load_config(folder: Path) -> dict[str, object]:
    """Return a run's config as dotted key -> value, without `NOT_COMPARED`.

    Raises:
        InputError: The folder's `config.yaml` is not that of a run.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config = relocate(config, config["output"], "OUTPUT")
        return flatten({key: value for key, value in config.items() if key not in NOT_COMPARED})
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"'{folder / 'config.yaml'}' is not the config of a run: expected one that train.py "
            "wrote."
        ) from error


def differences(configs: Sequence[dict[str, object]]) -> dict[str, list[str]]:
    """Return key -> value in each config, as text, for the keys that differ.

    Redundant keys are left out: longer copies of a shorter key (`model.seed` of `seed`), and
    options of a part that only some runs have, if its `_target_` tells the runs apart as well.

    Args:
        configs: From `load_config`.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    columns = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    columns = {key: column for key, column in columns.items() if len(set(column)) > 1}

    def repeated(key: str) -> bool:
        parts = key.split(".")
        suffixes = [".".join(parts[i:]) for i in range(1, len(parts))]
        return any(columns.get(suffix) == columns[key] for suffix in suffixes)

    def implied_by_class(key: str) -> bool:
        if all(key in config for config in configs):
            return False
        parts = key.split(".")
        targets = (".".join([*parts[:i], "_target_"]) for i in range(1, len(parts)))
        classes = [columns[target] for target in targets if target in columns]
        return any(len({*zip(own, columns[key], strict=True)}) == len({*own}) for own in classes)

    return {
        key: column
        for key, column in columns.items()
        if not repeated(key) and not implied_by_class(key)
    }
