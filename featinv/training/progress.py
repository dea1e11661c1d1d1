"""Progress of a run: the step of its logs, and its progress bar."""

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from featinv.models.base import Inverter


class StepClock(L.Callback):
    """Keep the step of the logs equal to the optimiser step in resumed runs.

    Lightning is one step ahead if the run was saved at its end or on an interruption.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Inverter, *args) -> None:
        """Set the step. This must be the first callback, so that none logs before it."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with a unit; a whole training is one epoch, resumed or not."""

    def on_train_start(self, trainer: L.Trainer, *args) -> None:
        """Open the bar, which counts batches, where training starts or resumes."""
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.unit, bar.total = "batch", trainer.num_training_batches
        bar.n = bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_train_epoch_start(self, *args) -> None:
        """Leave the bar alone: Lightning skips this where it resumes within an epoch."""

    def on_exception(self, *args) -> None:
        """End the bar's line, so that the error starts on a new one."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()
