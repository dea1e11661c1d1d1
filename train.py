"""Train a FeatInv, evaluate it, and leave everything in one folder.

python train.py data=imagenette data.root=PATH backbone=resnet50 conditioning=pooled
"""

import logging
import warnings
import zipfile
from pathlib import Path

import lightning as L
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from featinv.callbacks import StepClock
from featinv.checkpoints import LAST_FILE, MODEL_FILE, build_model, save_model
from featinv.cli import run_entry_point
from featinv.data.base import at_least
from featinv.errors import InputError
from featinv.evaluation import Evaluation
from featinv.loggers import curves
from featinv.module import FeatInv
from featinv.report import curves_figure, markdown_table, save_figure

log = logging.getLogger("train")


# What a resumed run may be told anew. The rest stands in the weights and in the optimiser's state.
CHANGEABLE = ("trainer", "data", "callbacks", "logger", "evaluation", "validate_every_n_steps")


def load_resumed(config: DictConfig) -> DictConfig:
    """Return the config of the run to resume, with the values given now on the command line."""
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
    resumed = OmegaConf.create(relocate(saved, saved["output"], str(folder)))
    for override in HydraConfig.get().overrides.task:
        key = override.split("=")[0].lstrip("+")
        if key == "resume":
            continue
        group = OmegaConf.is_dict(OmegaConf.select(resumed, key))
        if group or key.split(".")[0] not in CHANGEABLE:
            raise InputError(
                f"'{override}' cannot change a resumed run, which goes on with its own config: "
                "expected single values such as trainer.max_steps=10000, or a new run."
            )
        OmegaConf.update(resumed, key, OmegaConf.select(config, key))
    resumed.resume = str(folder)
    log.info("Resuming the run in %s", folder)
    return resumed


def relocate(node: object, old: str, new: str) -> object:
    """Return a config whose paths in one folder are paths in another: a run may have moved."""
    if isinstance(node, dict):
        return {key: relocate(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [relocate(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node


def check_values(config: DictConfig) -> None:
    """Raise an `InputError` for numbers that the trainer would take without a word."""
    for key in (
        "trainer.max_steps",
        "trainer.accumulate_grad_batches",
        "trainer.log_every_n_steps",
        "validate_every_n_steps",
    ):
        at_least(key, OmegaConf.select(config, key), 1)
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed is {config.seed}, expected 0 to {2**32 - 1}.")


def fit(config: DictConfig, model: FeatInv, data: L.LightningDataModule) -> L.Trainer:
    """Train a model; its averaged weights stand in it afterwards."""
    accumulate = config.trainer.accumulate_grad_batches
    trainer = instantiate(
        config.trainer,
        logger=list(instantiate(config.logger).values()),
        callbacks=[StepClock(), *instantiate(config.callbacks).values()],
        default_root_dir=config.output,
        use_distributed_sampler=False,  # the data modules split the stream over the ranks
        num_sanity_val_steps=0,
        # Optimiser steps are the clock; Lightning counts these in batches.
        limit_train_batches=config.trainer.max_steps * accumulate,
        val_check_interval=min(config.validate_every_n_steps, config.trainer.max_steps)
        * accumulate,
        check_val_every_n_epoch=None,
    )
    # The data modules go on at the right sample by themselves.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    if data.num_workers == 0:  # a choice: what is held in memory needs no workers
        warnings.filterwarnings("ignore", ".*does not have many workers")
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    checkpoint = str(Path(config.output) / LAST_FILE) if config.resume else None
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def evaluate(
    config: DictConfig, evaluation: Evaluation, data: L.LightningDataModule, loggers: list[Logger]
) -> None:
    """Score the trained model on held-out images, print the table and log it."""
    try:
        evaluation.run(data.test_dataloader())
    finally:  # whatever was computed is written down, even if the data turn out to be broken
        if evaluation.keys:
            evaluation.save(config.output, checkpoint=str(Path(config.output) / MODEL_FILE))
    rows = evaluation.table_rows()
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("table", list(rows[0]), [list(row.values()) for row in rows])
    print(f"\n{markdown_table(rows)}\n{evaluation.caption()}")


def train(config: DictConfig) -> None:
    """Run one job: train, save, evaluate, report."""
    if config.resume:
        config = load_resumed(config)
    check_values(config)
    folder = Path(config.output)
    L.seed_everything(config.seed, verbose=False)
    # All is made before anything is trained, so that bad values are told now, not after hours.
    model = build_model(OmegaConf.to_container(config.model, resolve=True))
    options = dict(config.evaluation)
    data = instantiate(config.data, max_images=options.pop("num_images"))
    prior = model.controlnet is None
    evaluation = None if prior else Evaluation(model, seed=config.seed, **options)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)

    trainer = fit(config, model, data)
    if not trainer.is_global_zero:
        return
    save_model(model, folder / MODEL_FILE)
    save_figure(curves_figure(curves(folder)), folder / "curves.png")
    if prior:
        log.info(
            "A prior is not evaluated; train on it with model=small_on_prior model.unet.path=%s",
            folder,
        )
    elif trainer.world_size > 1:
        log.info("Evaluate on one device: python evaluate.py checkpoint=%s", folder)
    else:
        model.eval().to(trainer.strategy.root_device)  # `fit` leaves it on the CPU
        evaluate(config, evaluation, data, trainer.loggers)
    log.info("The run is in %s", folder)


def main(config: DictConfig) -> None:
    """Run `train`; close the W&B run whatever happens."""
    failed = True
    try:
        train(config)
        failed = False
    finally:
        if wandb.run is not None:
            folder = Path(wandb.run.dir).parent
            offline = wandb.run.offline
            wandb.finish(exit_code=int(failed))
            if offline:
                log.info("Send this run to W&B with: wandb sync %s", folder)


if __name__ == "__main__":
    run_entry_point(main, "train")
