"""EMA: averaged weights for validation and for the final model."""

import lightning as L
import torch
from torch.optim.swa_utils import AveragedModel

from featinv.models.featinv import FeatInv
from featinv.utils.errors import InputError


class EMA(L.Callback):
    """Exponential moving average of the trained weights, for validation and for the final model.

    The average is over optimiser steps; early on it is shorter, min(decay, (1 + n) / (10 + n))
    after n steps, so that the random start is soon forgotten. During validation the averaged
    weights stand in the model, and after training they stay there.

    Args:
        decay: Weight of the past in each step, in [0, 1).

    Raises:
        InputError: A decay out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay is {decay}, expected 0 or more and less than 1.")
        self.decay = decay
        self.average: AveragedModel | None = None
        self._training_weights: dict[str, torch.Tensor] | None = None
        self._step = 0

    @property
    def state_key(self) -> str:
        """Name of the averaged weights in a Lightning checkpoint."""
        return "EMA"

    def _update(self, averaged: list, current: list, num_averaged: torch.Tensor) -> None:
        n = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))

    def setup(self, trainer: L.Trainer, pl_module: FeatInv, stage: str) -> None:
        """Copy the trained modules, and only those."""
        if stage == "fit":
            self.average = AveragedModel(pl_module.trained(), multi_avg_fn=self._update)
            self.average.requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Follow the model to its device, and start counting from the step that training has."""
        self.average.to(pl_module.device)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: FeatInv, *args) -> None:
        """Average after every optimiser step (not every batch: gradients may accumulate)."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.average.update_parameters(pl_module.trained())

    def on_validation_start(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Put the averaged weights into the model."""
        if self.average is not None and self.average.n_averaged > 0:
            trained = pl_module.trained()
            self._training_weights = {k: v.clone() for k, v in trained.state_dict().items()}
            trained.load_state_dict(self.average.module.state_dict())

    def on_validation_end(self, trainer: L.Trainer, pl_module: FeatInv, *args) -> None:
        """Put the training's weights back."""
        if self._training_weights is not None:
            pl_module.trained().load_state_dict(self._training_weights)
            self._training_weights = None

    # An interruption may come during validation, and what is saved then is the training's state.
    on_exception = on_validation_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Leave the averaged weights in the model."""
        if self.average.n_averaged > 0:
            pl_module.trained().load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict:
        """Return the averaged weights and how many steps they average."""
        return {
            "weights": self.average.module.state_dict(),
            "num_averaged": int(self.average.n_averaged),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the averaged weights of a checkpoint."""
        self.average.module.load_state_dict(state_dict["weights"])
        self.average.n_averaged.fill_(state_dict["num_averaged"])
