"""Resume: the config of a run that goes on where it stopped, perhaps killed at any moment."""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from featinv.checkpoints import LAST_FILE, find_paths
from featinv.utils.errors import InputError
from featinv.utils.paths import relocate

log = logging.getLogger(__name__)

# What a resumed run may be told anew. The rest stands in the weights and in the optimiser's state.
CHANGEABLE = (
    "trainer",
    "epochs",
    "data",
    "callbacks",
    "logger",
    "evaluation",
    "validate_every_n_steps",
)
# What the configs of runs of earlier versions name, and where it is now.
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
    """Return the config to train with, whether that is a new run or one that goes on.

    Args:
        config: The config as composed now. `config.resume` is null, a run's folder, or `"auto"`:
            the same command again goes on with the run in `config.output`, once it has saved.
        overrides: What stands on the command line, such as `"trainer.max_steps=10000"`.

    Raises:
        InputError: As `load_resumed`; or, with `"auto"`, the run there was started otherwise.
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
    now, then = values(config), values(resumed)
    changed = [key for key in now | then if now.get(key) != then.get(key)]
    if fixed := [key for key in changed if key.split(".")[0] not in CHANGEABLE]:
        key = min(fixed, key=lambda key: key.count("."))  # the others may follow from it
        raise InputError(
            f"{key} is {now.get(key)}, but the run in '{config.output}' was started with "
            f"{then.get(key)}: expected the same to go on with it, or another output for a new run."
        )
    return config


def values(config: DictConfig) -> dict[str, object]:
    """Return the single values of a config by their whole keys, such as `trainer.max_steps`."""
    leaves: dict[str, object] = {}

    def walk(node: object, key: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else name)
        else:
            leaves[key] = node

    walk(OmegaConf.to_container(config, resolve=True), "")
    return leaves


def load_resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config of the run to resume, with the values given now on the command line.

    Args:
        config: The config as composed now; `config.resume` is the run's folder.
        overrides: What stands on the command line, such as `"trainer.max_steps=10000"`.

    Raises:
        InputError: No run to resume, a damaged checkpoint, or a value that cannot change.
    """
    folder = Path(config.resume)
    if not (folder / "config.yaml").is_file() or not (folder / LAST_FILE).is_file():
        raise InputError(
            f"There is no run to resume in '{folder}': expected a folder with config.yaml and "
            f"{LAST_FILE}."
        )
    if not zipfile.is_zipfile(folder / LAST_FILE):  # its end says what is in it
        raise InputError(
            f"The checkpoint '{folder / LAST_FILE}' is damaged: expected it as it was written; "
            "the averaged weights may still be whole, for evaluate.py or model.unet.path."
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
        group = OmegaConf.is_dict(OmegaConf.select(resumed, key))
        if group or key.split(".")[0] not in CHANGEABLE:
            raise InputError(
                f"'{override}' cannot change a resumed run, which goes on with its own config: "
                "expected single values such as trainer.max_steps=10000, or a new run."
            )
        if key == "trainer.max_steps":
            resumed.epochs = None  # what they came to before
        OmegaConf.update(resumed, key, OmegaConf.select(config, key))
    resumed.resume = str(folder)
    log.info("Resuming the run in %s", folder)
    return resumed
