"""`featinv-train`: build a model, its data and its trainer; fit, save, evaluate."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from featinv.checkpoints import LAST_FILE, MODEL_FILE, build_model, load_weights, save_model
from featinv.cli.app import run_entry_point, run_evaluation
from featinv.cli.resume import resolve_resume
from featinv.data.base import ImageDataModule
from featinv.evaluation.evaluator import Evaluator
from featinv.evaluation.figures import save_figure
from featinv.evaluation.plots import curves_figure
from featinv.evaluation.tables import text_frame
from featinv.training.fit import fit
from featinv.training.guards import end_together
from featinv.training.loggers import HISTORY_FILE, WANDB_ID_FILE, curves, finish_wandb
from featinv.training.progress import StepClock
from featinv.utils import precision
from featinv.utils.errors import InputError, at_least
from featinv.utils.files import write_text

log = logging.getLogger("train")


def train(config: DictConfig) -> None:
    """Build, fit, save, evaluate."""
    config = resolve_resume(config, HydraConfig.get().overrides.task)
    check_config(config)
    choose_precision(config)
    L.seed_everything(config.seed, verbose=False)
    # Fail fast: build everything before training anything.
    model = build_model(OmegaConf.to_container(config.model, resolve=True))
    if config.init_from is not None and not config.resume:
        load_weights(model, config.init_from)
    data = instantiate(config.data, max_images=config.evaluation.num_images)
    set_steps(config, data)
    evaluator = None if model.conditioning == "none" else make_evaluator(config, model)
    trainer = make_trainer(config)
    if trainer.is_global_zero:
        prepare_folder(config)
    end_together(trainer.local_rank)

    if list(model.trained().parameters()):  # a method may have nothing to train
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
        checkpoint = Path(config.output) / LAST_FILE if config.resume else None
        fit(trainer, model, data, checkpoint, config.validate_first)
    if trainer.is_global_zero:
        save(config, model)
    if evaluator is not None:
        model.eval().to(trainer.strategy.root_device)  # `fit` leaves it on the CPU
        evaluate(config, evaluator, data, trainer)
    if trainer.is_global_zero:
        log.info("The run is in %s", config.output)


def check_config(config: DictConfig) -> None:
    """Raise an `InputError` for values that the trainer would accept silently."""
    for key in (
        "trainer.max_steps",
        "trainer.accumulate_grad_batches",
        "trainer.log_every_n_steps",
        "validate_every_n_steps",
    ):
        at_least(key, OmegaConf.select(config, key), 1)
    if config.seed is None or not 0 <= config.seed < 2**32:
        raise InputError(f"seed is {config.seed}, expected 0 to {2**32 - 1}.")
    unet = config.model.get("unet")
    if unet is None:  # not a diffusion model
        return
    if not config.model.train_unet and unet._target_ == "diffusers.UNet2DConditionModel":
        raise InputError(
            "model.train_unet=false would freeze a UNet with random weights: expected "
            "model=small_on_prior with a trained one in model.unet.path."
        )
    prior, folder = unet.get("path"), Path(config.output).resolve()
    if prior is not None and folder in (Path(prior).resolve(), *Path(prior).resolve().parents):
        raise InputError(f"The run would overwrite its prior '{prior}': choose another output.")


def choose_precision(config: DictConfig) -> None:
    """Replace `trainer.precision=auto` with the faster precision on this machine.

    Each of several ranks measures for itself: weights and gradients are float32 in either
    precision, so ranks of unequal machines may differ. Lightning's other precisions, such as
    `64-true`, are left alone.
    """
    trainer = config.trainer
    if trainer.precision not in precision.PRECISIONS:
        return
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if rank_zero_only.rank > 0:
        precision.log.setLevel(logging.ERROR)  # the first rank logs for all
    device = torch.device("cuda" if gpu else "cpu")
    trainer.precision = precision.resolve_precision(trainer.precision, device)


def set_steps(config: DictConfig, data: ImageDataModule) -> None:
    """Turn `epochs` into `trainer.max_steps`, for any number of devices.

    Counts the remaining samples of a resumed run, since its batch size may have changed.
    """
    if config.epochs is None:
        return
    size = global_batch_size(config.trainer, data.batch_size)
    if size is None or not isinstance(config.epochs, int | float) or not config.epochs > 0:
        raise InputError(
            f"epochs is {config.epochs} with trainer.devices={config.trainer.devices}, expected a "
            "number above 0 and a number of devices, for example epochs=3 trainer.devices=1."
        )
    done = {"step": 0, "samples": 0}
    if config.resume:
        path = Path(config.output) / LAST_FILE
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        done = checkpoint.get(type(data).__qualname__, done)
    samples_left = max(0, config.epochs * data.epoch_size() - done["samples"])
    config.trainer.max_steps = done["step"] + math.ceil(samples_left / size)


def global_batch_size(trainer: Mapping, batch_size: int) -> int | None:
    """Return the images of an optimiser step of all devices; None if their number is open."""
    if not isinstance(trainer["devices"], int):
        return None
    devices = trainer["devices"] * trainer.get("num_nodes", 1)
    return batch_size * trainer["accumulate_grad_batches"] * devices


def make_evaluator(config: DictConfig, model: torch.nn.Module) -> Evaluator:
    """Return the evaluator; with `evaluation.precision=auto` it draws in that of training."""
    options = dict(config.evaluation)
    del options["num_images"]  # an option of the data
    if options["precision"] == "auto" and config.trainer.precision in precision.PRECISIONS:
        options["precision"] = config.trainer.precision
    return Evaluator(model, seed=config.seed, **options)


def make_trainer(config: DictConfig) -> L.Trainer:
    """Return the trainer, which knows this process's rank."""
    accumulate = config.trainer.accumulate_grad_batches
    trainer = instantiate(
        config.trainer,
        logger=list(instantiate(config.logger).values()),
        callbacks=[StepClock(), *instantiate(config.callbacks).values()],
        default_root_dir=config.output,
        use_distributed_sampler=False,  # the data modules split the stream over the ranks
        num_sanity_val_steps=0,
        # Lightning counts these in batches, the config in optimiser steps.
        limit_train_batches=config.trainer.max_steps * accumulate,
        val_check_interval=min(config.validate_every_n_steps, config.trainer.max_steps)
        * accumulate,
        check_val_every_n_epoch=None,
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    by_time = "${now:" in OmegaConf.to_container(config)["output"]
    if by_time and environment is not None and environment.creates_processes_externally:
        raise InputError(
            f"Each rank would have its own folder, such as '{config.output}': expected one that "
            "they share, for example output=outputs/run."
        )
    return trainer


def prepare_folder(config: DictConfig) -> None:
    """Write the config to the run's folder; remove the logs of an earlier run there."""
    folder = Path(config.output)
    if not config.resume:
        for name in (HISTORY_FILE, WANDB_ID_FILE, LAST_FILE):
            (folder / name).unlink(missing_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))


def save(config: DictConfig, model: torch.nn.Module) -> None:
    """Save the model and its training curves; log how the feature cosine changed."""
    folder = Path(config.output)
    save_model(model, folder / MODEL_FILE)
    history = curves(folder)
    if history:
        save_figure(curves_figure(history), folder / "curves.png")
    points = history.get("val/feature_cosine", [])  # of the images in the sample grids
    if len(points) > 1:
        (first, before), (last, after) = points[0], points[-1]
        log.info(
            "val/feature_cosine went from %.3f at step %d to %.3f at step %d; the pictures are in "
            "%s",
            *(before, first, after, last),
            folder / "grids",
        )
    if model.conditioning == "none":
        log.info(
            "A prior is not evaluated; train on it with model=small_on_prior model.unet.path=%s",
            folder,
        )


def evaluate(
    config: DictConfig, evaluator: Evaluator, data: ImageDataModule, trainer: L.Trainer
) -> None:
    """Score the model on held-out images, on all ranks; print and log the table."""
    about = {"checkpoint": str(Path(config.output) / MODEL_FILE), "data": dict(config.data)}
    first = trainer.is_global_zero
    rows = run_evaluation(evaluator, data.test_dataloader(), config.output, first, **about)
    for logger in trainer.loggers if first else ():
        if isinstance(logger, WandbLogger):
            logger.log_table("table", dataframe=text_frame(rows))


def main(config: DictConfig) -> None:
    """Run `train`; always close the W&B run."""
    try:
        train(config)
    except BaseException:
        finish_wandb(failed=True)
        raise
    finish_wandb(failed=False)


def run() -> None:
    """Run the command line."""
    run_entry_point(main, "train")


if __name__ == "__main__":
    run()
