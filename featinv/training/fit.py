"""fit: Lightning's training loop, set up for this project's data and checkpoints."""

import atexit
import signal
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
    """Train a model; afterwards it holds the averaged weights.

    Args:
        trainer: Made with `use_distributed_sampler=False`, `check_val_every_n_epoch=None`.
        model: What to train.
        data: Training and validation images.
        checkpoint: Lightning checkpoint to resume from.
        validate_first: Whether to validate before the first step too.
    """
    try:
        if validate_first and checkpoint is None:
            trainer.validate(model, data, verbose=False)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        # Ranks that Lightning started would wait for this one. Kill them at exit: Lightning ends
        # this process as soon as they die.
        if trainer.strategy.launcher is not None:
            atexit.register(trainer.strategy.launcher.kill, signal.SIGKILL)
        raise
