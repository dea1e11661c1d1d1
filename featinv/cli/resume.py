"""Resume: the config of a run that continues where it stopped or was killed."""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from featinv.checkpoints import LAST_FILE, find_paths
from featinv.utils.errors import InputError
from featinv.utils.paths import flatten, relocate

log = logging.getLogger(__name__)

# Keys that may change on resuming; the others determine the weights and the optimiser's state.
CHANGEABLE = (
    "trainer",
    "epochs",
    "data",
    "callbacks",
    "logger",
    "evaluation",
    "validate_every_n_steps",
)
# Classes in configs of earlier versions, and where they are now.
MOVED = {
    "featinv.callbacks.EMA": "featinv.training.ema.EMA",
    "featinv.callbacks.ProgressBar": "featinv.training.progress.ProgressBar",
    "featinv.callbacks.SampleGrid": "featinv.training.sample_grid.SampleGrid",
    "featinv.callbacks.SaveLast": "featinv.training.checkpointing.SaveLast",
    "featinv.guards.StopOnSignal": "featinv.training.guards.Guard",
    "featinv.loggers.FileLogger": "featinv.training.loggers.FileLogger",
    "featinv.loggers.make_wandb_logger": "featinv.training.loggers.make_wandb_logger",
    "featinv.training.guards.StopOnSignal": "featinv.training.guards.Guard",
}


def resolve_resume(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config to train with: of a new run, or of a resumed one.

    Args:
        config: The config as composed now. `config.resume` is null, a run's folder, or `"auto"`,
            which resumes the run in `config.output` once it has a checkpoint.
        overrides: Those of the command line, such as `"trainer.max_steps=10000"`.

    Raises:
        InputError: As `load_resumed`; with `"auto"`, the run was started with other values.
    """
    if config.resume is None:
        return config
    if config.resume != "auto":
        return load_resumed(config, overrides)
    if not (Path(config.output) / LAST_FILE).is_file():
        return OmegaConf.merge(config, {"resume": None})
    config = OmegaConf.merge(config, {"resume": config.output})
    resumed = load_resumed(config, [])
    if config.trainer.precision == "auto":  # decided when the run was started
        config.trainer.precision = resumed.trainer.precision
    now, then = (flatten(OmegaConf.to_container(c, resolve=True)) for c in (config, resumed))
    changed = [key for key in now | then if now.get(key) != then.get(key)]
    if fixed := [key for key in changed if key.split(".")[0] not in CHANGEABLE]:
        key = min(fixed, key=lambda key: key.count("."))  # the others may derive from it
        raise InputError(
            f"{key} is {now.get(key)}, but the run in '{config.output}' was started with "
            f"{then.get(key)}: expected the same to resume it, or another output for a new run."
        )
    return config


def load_resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config of the run in the folder `config.resume`, updated by the overrides.

    Raises:
        InputError: No run to resume, a damaged checkpoint, or a value that cannot change.
    """
    folder = Path(config.resume)
    if not (folder / "config.yaml").is_file() or not (folder / LAST_FILE).is_file():
        raise InputError(
            f"There is no run to resume in '{folder}': expected a folder with config.yaml and "
            f"{LAST_FILE}."
        )
    if not zipfile.is_zipfile(folder / LAST_FILE):  # a zip file's index is at its end
        raise InputError(
            f"The checkpoint '{folder / LAST_FILE}' is damaged, so the run cannot be resumed; the "
            "averaged weights may still be intact, for evaluate.py or model.unet.path."
        )
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for part in (*saved["callbacks"].values(), *saved["logger"].values()):
        part["_target_"] = MOVED.get(part["_target_"], part["_target_"])
    saved["model"] = find_paths(saved["model"], folder / LAST_FILE)
    resumed = OmegaConf.create(relocate(saved, saved["output"], str(folder)))
    for override in overrides:
        key = override.split("=")[0].lstrip("+")
        if key == "resume":
            continue
        is_group = OmegaConf.is_dict(OmegaConf.select(resumed, key))
        if is_group or key.split(".")[0] not in CHANGEABLE:
            raise InputError(
                f"'{override}' cannot change a resumed run, which keeps its config: expected "
                "single values such as trainer.max_steps=10000, or a new run."
            )
        if key == "trainer.max_steps":
            resumed.epochs = None
        OmegaConf.update(resumed, key, OmegaConf.select(config, key))
    resumed.resume = str(folder)
    log.info("Resuming the run in %s", folder)
    return resumed
