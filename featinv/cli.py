"""What the entry points share: bad input ends in one sentence and exit code 2."""

import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from featinv.errors import InputError, cause_of, unknown

CONFIGS = Path(__file__).parents[1] / "configs"

OmegaConf.register_new_resolver("run_folder", lambda resume, output: resume or output, replace=True)


def run_entry_point(main: Callable[[], None], config_name: str) -> None:
    """Run a Hydra entry point; tell the user's mistakes in one sentence, without a traceback.

    Args:
        main: The function that `hydra.main` made.
        config_name: Name of its config, to offer the nearest keys.
    """
    # Hydra would print errors itself and exit with 1; this lets them through to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = _explain(error, config_name)
        if sentence is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _explain(error: BaseException, config_name: str) -> str | None:
    """Return the sentence for an error that the user can mend, None for a bug."""
    error = cause_of(error)
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use '{error.filename}': {error.strerror}; expected a path with access."
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_key(match[1], config_name)
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, name = match[1], match[2]
        return str(unknown(f"{group} config", name, _options(group)))
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"The value of {match[1]} is missing: set it with {match[1]}=..."
    return " ".join(text.split())


def _explain_key(key: str, config_name: str) -> str:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(config_name)
    group = key.split(".")[0].lstrip("+~")
    nearest = get_close_matches(key, _keys(config), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys."
    if key == group and _options(group):
        hint = f"choose {group} from {', '.join(_options(group))}."
    return f"Unknown config key '{key}': {hint}"


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        keys.append(prefix + str(name))
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node._get_node(name)):
            keys += _keys(node._get_node(name), f"{prefix}{name}.")
    return keys


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
