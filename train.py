"""Train a FeatInv, evaluate it, and leave everything in one folder.

python train.py data=imagenette data.root=PATH backbone=resnet50 conditioning=pooled
"""

import logging
from pathlib import Path

import hydra
import lightning as L
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from featinv.checkpoints import LAST_FILE, MODEL_FILE, build_model, save_model
from featinv.cli import run_entry_point
from featinv.errors import InputError
from featinv.evaluation import Evaluation
from featinv.loggers import curves
from featinv.report import curves_figure, markdown_table, save_figure

log = logging.getLogger("train")


def load_resumed(config: DictConfig) -> DictConfig:
    """Return the config of the run to resume, with the values given now on the command line."""
    folder = Path(config.resume)
    if not (folder / "config.yaml").is_file() or not (folder / LAST_FILE).is_file():
        raise InputError(
            f"There is no run to resume in '{folder}': expected a folder with config.yaml and "
            f"{LAST_FILE}."
        )
    overrides = HydraConfig.get().overrides.task
    resumed = OmegaConf.load(folder / "config.yaml")
    for override in overrides:
        if OmegaConf.is_dict(OmegaConf.select(resumed, override.split("=")[0].lstrip("+"))):
            raise InputError(
                f"'{override}' cannot change a resumed run, which goes on with its own config: "
                "expected single values such as trainer.max_steps=10000, or a new run."
            )
    return OmegaConf.merge(
        resumed, OmegaConf.from_dotlist(list(overrides)), {"output": str(folder)}
    )


def fit(config: DictConfig) -> tuple[L.Trainer, L.LightningDataModule]:
    """Train a model; its averaged weights stand in `trainer.lightning_module` afterwards."""
    if config.validate_every_n_steps < 1 or config.trainer.max_steps < 1:
        raise InputError(
            f"validate_every_n_steps is {config.validate_every_n_steps} and trainer.max_steps "
            f"{config.trainer.max_steps}, expected 1 or more."
        )
    model = build_model(OmegaConf.to_container(config.model, resolve=True))
    data = instantiate(config.data, max_images=config.evaluation.num_images)
    accumulate = config.trainer.accumulate_grad_batches
    trainer = instantiate(
        config.trainer,
        logger=list(instantiate(config.logger).values()),
        callbacks=list(instantiate(config.callbacks).values()),
        default_root_dir=config.output,
        use_distributed_sampler=False,  # the data modules split the stream over the ranks
        num_sanity_val_steps=0,
        # Optimiser steps are the clock; Lightning counts these in batches.
        limit_train_batches=config.trainer.max_steps * accumulate,
        val_check_interval=min(config.validate_every_n_steps, config.trainer.max_steps)
        * accumulate,
        check_val_every_n_epoch=None,
    )
    checkpoint = str(Path(config.output) / LAST_FILE) if config.resume else None
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return trainer, data


def evaluate(config: DictConfig, trainer: L.Trainer, data: L.LightningDataModule) -> None:
    """Score the trained model on held-out images, print the table and log it."""
    options = {name: value for name, value in config.evaluation.items() if name != "num_images"}
    evaluation = Evaluation(trainer.lightning_module.eval(), seed=config.seed, **options)
    try:
        evaluation.run(data.test_dataloader())
    finally:  # whatever was computed is written down, even if the data turn out to be broken
        if evaluation.keys:
            evaluation.save(config.output, checkpoint=str(Path(config.output) / MODEL_FILE))
    rows = evaluation.table_rows()
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("table", list(rows[0]), [list(row.values()) for row in rows])
    print(f"\n{markdown_table(rows)}\n\n{evaluation.caption()}")


def train(config: DictConfig) -> None:
    """Run one job: train, save, evaluate, report."""
    if config.resume:
        config = load_resumed(config)
    folder = Path(config.output)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    L.seed_everything(config.seed, verbose=False)
    trainer, data = fit(config)
    if not trainer.is_global_zero:
        return
    save_model(trainer.lightning_module, folder / MODEL_FILE)
    save_figure(curves_figure(curves(folder)), folder / "curves.png")
    if trainer.lightning_module.controlnet is None:
        log.info(
            "A prior is not evaluated; train on it with model=small_on_prior model.unet.path=%s",
            folder,
        )
    elif trainer.world_size > 1:
        log.info("Evaluate on one device: python evaluate.py checkpoint=%s", folder)
    else:
        evaluate(config, trainer, data)


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run `train`; close the W&B run whatever happens."""
    failed = True
    try:
        train(config)
        failed = False
    finally:
        if wandb.run is not None:
            folder = Path(wandb.run.dir).parent
            offline = wandb.run.settings.mode == "offline"
            wandb.finish(exit_code=int(failed))
            if offline:
                log.info("Send this run to W&B with: wandb sync %s", folder)
    log.info("The run is in %s", config.resume or config.output)


if __name__ == "__main__":
    run_entry_point(main, "train")
