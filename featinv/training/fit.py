"""fit: Lightning's training loop, the way that this project's data and checkpoints take it."""

import atexit
import signal
import warnings
from pathlib import Path

import lightning as L

from featinv.data.base import ImageDataModule
from featinv.models.base import Inverter


def fit(
    trainer: L.Trainer,
    model: Inverter,
    data: ImageDataModule,
    checkpoint: Path | None = None,
    validate_first: bool = False,
) -> None:
    """Train a model; its averaged weights stand in it afterwards.

    Args:
        trainer: Made with `use_distributed_sampler=False`, `check_val_every_n_epoch=None`.
        model: What to train.
        data: Training and validation images.
        checkpoint: Go on from this Lightning checkpoint.
        validate_first: Validate before the first step too.
    """
    # The data modules go on at the right sample by themselves.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    if data.num_workers == 0:  # a choice: what is held in memory needs no workers
        warnings.filterwarnings("ignore", ".*does not have many workers")
    try:
        if validate_first and checkpoint is None:
            trainer.validate(model, data, verbose=False)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        # The other ranks would wait for this one. Lightning kills it as soon as they are dead.
        if trainer.strategy.launcher is not None:
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)
        raise
