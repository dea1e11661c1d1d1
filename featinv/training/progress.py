"""How far a run is: the step of its logs, its progress bar."""

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from featinv.models.featinv import FeatInv


class StepClock(L.Callback):
    """Keep the step of the logs equal to the optimiser step, whatever a run is resumed from.

    Lightning goes on one step too far if the run was saved at its end or at an interruption.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: FeatInv, *args) -> None:
        """Set the step; the first of all callbacks, so that none logs before it."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with its unit."""

    def init_train_tqdm(self):
        """Return the training's bar, which counts batches."""
        bar = super().init_train_tqdm()
        bar.unit = "batch"
        return bar

    def on_exception(self, *args) -> None:
        """End the bar's line: what is said of the error gets its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()
