"""Periodic checkpoints of the whole training state."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from featinv.models.base import Inverter
from featinv.utils.errors import at_least
from featinv.utils.files import atomic_write

log = logging.getLogger(__name__)


class Interruption(SystemExit):
    """Ends training between two optimiser steps, where its state is worth saving."""


class SaveLast(Checkpoint):
    """Save the whole training state every `every_n_steps`, at the end, and on an `Interruption`.

    The previous checkpoint stays in place until the next one is complete. Errors and a second
    Ctrl-C may strike in the middle of a step, so they save nothing.

    Args:
        path: The checkpoint file, overwritten each time.
        every_n_steps: Optimiser steps between two saves.

    Raises:
        InputError: `every_n_steps` is below 1; when saving, the disk is full.
    """

    def __init__(self, path: str, every_n_steps: int = 500) -> None:
        self.path = path
        self.every_n_steps = at_least("save_last.every_n_steps", every_n_steps, 1)
        self._step = 0  # the last one saved

    def setup(self, trainer: L.Trainer, pl_module: Inverter, stage: str) -> None:
        """Make the trainer write files atomically."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Inverter, checkpoint: dict[str, Any]
    ) -> None:
        """Convert the number of batches done to the current accumulation."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        change = batches - progress["total"]["processed"]
        for counts in (progress["total"], progress["current"]):
            counts.update({name: number + change for name, number in counts.items()})

    def on_train_start(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Count from the step that training starts from."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Inverter, *args) -> None:
        """Save after an optimiser step; a batch may only accumulate gradients."""
        if trainer.global_step >= self._step + self.every_n_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Save the final state."""
        if trainer.global_step > self._step:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Inverter, error: BaseException) -> None:
        """Save the state on an interruption; log how to resume."""
        if isinstance(error, Interruption):
            # Fetch the pending batch again on resuming.
            batches = trainer.fit_loop.epoch_loop.batch_progress
            batches.total.reset_on_restart()
            batches.current.reset_on_restart()
            self.on_train_end(trainer, pl_module)
        if isinstance(error, Interruption | KeyboardInterrupt) and trainer.is_global_zero:
            log.warning("Interrupted: %s", self.last_good(trainer))

    def last_good(self, trainer: L.Trainer) -> str:
        """Return where the last good checkpoint is, and how to resume from it."""
        if not Path(self.path).exists():
            return "nothing had been saved."
        return (
            f"the last good checkpoint is '{self.path}', after {self._step} steps; go on with "
            f"the option resume={trainer.default_root_dir}"
        )

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._step = trainer.global_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints atomically.

    Lightning writes to the folder for temporary files first; if that is on another disk, it then
    copies the file over the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        """Write a checkpoint; see Lightning's `CheckpointIO`."""
        with atomic_write(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, for a full disk
                raise (error.__context__ or error) from None
