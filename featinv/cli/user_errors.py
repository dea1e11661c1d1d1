"""User mistakes end in one sentence and exit code 2; bugs keep their traceback."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from featinv.utils.errors import InputError, unknown

# Options that need another package.
PLUGINS = {
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
}


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print user mistakes as one sentence, without a traceback, and exit with code 2."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str | None:
    """Return the sentence for an error that the user can fix, None for a bug."""
    if isinstance(error, InstantiationException):
        error = cause_of(error)
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: free some space, or choose another output folder."
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use '{error.filename}': {error.strerror}; expected a path with access."
    if isinstance(error, MisconfigurationException):
        return (
            f"The trainer cannot be set up ({text.rstrip('.!')}): expected devices that this "
            "machine has, for example trainer.accelerator=auto trainer.devices=1."
        )
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_option(error)
    for cause in (error, error.__cause__):  # of a value of the command line, or of a merged one
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(cause)
    if isinstance(error, HydraException | OmegaConfBaseException) or _raised_by_hydra(error):
        return text.split(" Config search path:")[0]
    return None


def cause_of(error: BaseException) -> BaseException:
    """Return the cause of an error of Hydra's `instantiate`.

    That is an `InputError`, if there is one or a class rejected its arguments; otherwise the
    innermost cause.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, InputError):
            return cause
    if len(causes) > 1 and isinstance(causes[-1], TypeError | ValueError):
        reason = " ".join(str(causes[-1]).split())
        return InputError(f"The configuration does not fit: {reason.rstrip('.')}.")
    return causes[-1]


def _raised_by_hydra(error: BaseException) -> bool:
    """Return whether this is one of the plain `ValueError`s of Hydra and OmegaConf."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    package = frame.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return isinstance(error, ValueError) and package in ("hydra", "omegaconf")


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = error.missing_cfg_file.rpartition("/")
    if package := PLUGINS.get(error.missing_cfg_file):
        return f"{group}={name} needs another package: pip install {package}"
    return str(unknown(f"{group} config", name, error.options))


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    prefix = error.full_key.rpartition(".")[0]
    keys = _keys(error.parent_node, f"{prefix}." if prefix else "")
    nearest = get_close_matches(error.full_key, keys, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys."
    return f"Unknown config key '{error.full_key}': {hint}"


def _keys(node: DictConfig, prefix: str) -> list[str]:
    """Return the full names of all keys below a node."""
    keys = []
    for name in node:
        keys.append(f"{prefix}{name}")
        below = OmegaConf.select(node, str(name), throw_on_resolution_failure=False)
        if OmegaConf.is_dict(below):
            keys += _keys(below, f"{prefix}{name}.")
    return keys
