"""What the entry points share: bad input ends in one sentence and exit code 2."""

import errno
import inspect
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader

from featinv.cli.sweeps import PLUGINS, jobs_listed, run_job
from featinv.data import ImageFiles
from featinv.evaluation.evaluator import Evaluator
from featinv.evaluation.tables import table_cells
from featinv.models.base import Inverter
from featinv.training.loggers import finish_wandb, make_wandb_logger
from featinv.utils.errors import InputError, at_least, unknown

CONFIGS = Path(__file__).parents[2] / "configs"

# Kinds of values: what may replace a default of the kind.
KINDS = {
    bool: ("true or false", bool),
    int: ("a whole number", int),
    float: ("a number", int | float),
    str: ("a text", str | int | float),
    ListConfig: ("a list", ListConfig),
    DictConfig: ("its single values", DictConfig),
}
ANY_KIND = ("trainer.devices",)  # a number, "auto" or a list


def _run_folder(resume: str | None, output: str) -> str:
    """Return the folder of the run: that of the resumed run if there is one."""
    named = resume and resume != "auto"  # which goes on in `output`
    return resume if named and (Path(resume) / "config.yaml").is_file() else output


OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def run_entry_point(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Run a function on the config that the command line asks for, or a sweep of configs.

    The user's mistakes are told in one sentence, without a traceback, and exit with code 2.

    Args:
        task: Takes the config; a function of the entry point's file.
        config_name: Name of the config in `CONFIGS`, perhaps in a folder with groups of its own.
    """
    _silence_noise()
    # Hydra would print errors itself and exit with 1; this lets them through to here.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    file = CONFIGS / config_name

    @hydra.main(version_base=None, config_path=str(file.parent), config_name=file.name)
    @wraps(task)
    def main(config: DictConfig) -> float | None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_job(config, inspect.getfile(task))
        folder = HydraConfig.get().runtime.output_dir
        if Path(config.output).absolute() != Path(folder):  # a resumed run
            config.output = folder
        with report_user_errors(config_name):
            _check_values(config, config_name)
            task(config)

    with report_user_errors(config_name), jobs_listed():
        main()


def command() -> str:
    """Return the command that started this job, to stand beside its results."""
    script = os.path.relpath(sys.argv[0], CONFIGS.parent)
    return shlex.join(["python", script, *HydraConfig.get().overrides.task])


def sampler_options(config: DictConfig) -> dict:
    """Return the values of the config group `sampler` that were given, for `Inverter.invert`."""
    given = config.sampler.items()
    return {name: value for name, value in given if value is not None and name != "_target_"}


def make_batches(config: DictConfig, model: Inverter) -> Iterable[dict]:
    """Return the batches of the data set, or of the image files, that the config names."""
    size = max(model.image_size, model.backbone.image_size)
    if config.images is not None:
        return DataLoader(ImageFiles(config.images, size), batch_size=8)
    config.backbone.image_size = size  # what data.image_size refers to
    if config.num_images is not None:
        at_least("num_images", config.num_images, 1)
    return instantiate(config.data, max_images=config.num_images).test_dataloader()


def make_evaluation(config: DictConfig, model: Inverter) -> Evaluator:
    """Return the evaluation of a model that the config asks for."""
    return Evaluator(
        model,
        config.num_samples,
        config.seed,
        config.batch_size,
        config.num_pictures,
        sampler_options(config),
        config.precision,
        config.extractors,
        config.lpips,
    )


def log_table(rows: Sequence[Mapping[str, str]], config: DictConfig) -> None:
    """Send a table to Weights & Biases if the config says wandb=true; offline without a key."""
    if not config.wandb:
        return
    name = HydraConfig.get().job.name
    columns, *cells = table_cells(rows)
    logger = make_wandb_logger(config.output, project="featinv", job_type=name)
    logger.log_table(name, columns, cells)
    finish_wandb(failed=False)


@contextmanager
def report_user_errors(config_name: str) -> Iterator[None]:
    """Print the user's mistakes in one sentence, without a traceback, and exit with code 2."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = _explain(error, config_name)
        if sentence is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _silence_noise() -> None:
    """Hide what does not concern the user; other warnings stay."""
    # Lightning's INFO lines are tips, advertisements and the devices that are not there.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*in eval mode at the start of training",  # frozen modules are, on purpose
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning's, about its own use of torch
    ):
        warnings.filterwarnings("ignore", message)


def _check_values(config: DictConfig, config_name: str) -> None:
    """Raise an `InputError` for a missing value, or one of another kind than its default.

    A float without fraction, such as 1e5, is taken for a whole number where one is expected.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"The value of {missing[0]} is missing: set it with {missing[0]}=...")
    name = Path(config_name).name
    if HydraConfig.get().job.config_name != name:
        return  # a config of the user's own, by --config-name: there are no defaults
    overrides = HydraConfig.get().overrides.task
    defaults = compose(name, _choices(overrides))
    for key in (override.split("=")[0] for override in overrides):
        if _options(key) or key.startswith(("+", "~")) or key in ANY_KIND:
            continue
        default, value = OmegaConf.select(defaults, key), OmegaConf.select(config, key)
        if default is None or value is None:
            continue
        if type(default) is int and isinstance(value, float) and value.is_integer():
            OmegaConf.update(config, key, int(value))
            continue
        expected, kind = KINDS[type(default)]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            if kind is DictConfig:
                key_below = next(iter(default))
                example = f"{key}.{key_below}={default[key_below]}"
            else:
                example = default
            raise InputError(f"{key} is '{value}', expected {expected}, for example {example}.")


def cause_of(error: BaseException) -> BaseException:
    """Return what stands behind an error of Hydra's `instantiate`.

    That is an `InputError` where there is one, or where a class refused a value or an argument;
    else the innermost cause.
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


def _explain(error: BaseException, config_name: str) -> str | None:
    """Return the sentence for an error that the user can mend, None for a bug."""
    if isinstance(error, InstantiationException):
        error = cause_of(error)
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "There is no room left on the disk: expected some, or another output folder."
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use '{error.filename}': {error.strerror}; expected a path with access."
    if isinstance(error, MisconfigurationException):
        return (
            f"The trainer cannot be set up ({text.rstrip('.!')}); expected what this machine has: "
            "trainer.accelerator=auto and trainer.devices=1 take it."
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_key(match[1], config_name)
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, name = match[1], match[2]
        if package := PLUGINS.get(f"{group}={name}"):
            return f"{group}={name} needs another package: pip install {package}"
        if options := _options(group):
            return str(unknown(f"{group} config", name, options))
    return text.split(" Config search path:")[0]


def _explain_key(key: str, config_name: str) -> str:
    GlobalHydra.instance().clear()
    file = CONFIGS / config_name
    with initialize_config_dir(str(file.parent), version_base=None):
        choices = [c for c in _choices(sys.argv[1:]) if not c.startswith(f"{key}=")]
        config = compose(file.name, choices)
    nearest = get_close_matches(key, _keys(config), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "see --help for all keys."
    return f"Unknown config key '{key}': {hint}"


def _choices(overrides: Iterable[str]) -> list[str]:
    """Return those of the overrides that choose from a config group."""
    return [override for override in overrides if _options(override.split("=")[0])]


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        keys.append(prefix + str(name))
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node._get_node(name)):
            keys += _keys(node._get_node(name), f"{prefix}{name}.")
    return keys


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
