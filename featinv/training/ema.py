"""EMA: averaged weights, for validation and for the final model."""

import lightning as L
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from featinv.models.base import Inverter
from featinv.utils.errors import InputError


class EMA(L.Callback):
    """Exponential moving average of the trained weights over optimiser steps.

    The decay is min(decay, (1 + n) / (10 + n)) after n steps, to forget the random start soon. The
    averaged weights are in the model during validation and after training.

    Args:
        decay: Weight of the past in each step, in [0, 1).

    Raises:
        InputError: `decay` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay is {decay}, expected 0 or more and less than 1.")
        self.decay = decay
        self.average: EMAModel | None = None
        self._trained: dict[str, Parameter] = {}
        self._step = 0

    @property
    def state_key(self) -> str:
        """Name of the averaged weights in a Lightning checkpoint."""
        return "EMA"

    def setup(self, trainer: L.Trainer, pl_module: Inverter, stage: str) -> None:
        """Copy the trained weights."""
        if stage == "fit":
            self._trained = dict(pl_module.trained().named_parameters())
            self.average = EMAModel(self._trained.values(), self.decay)

    def on_train_start(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Move to the model's device; count from the step that training starts from."""
        self.average.to(pl_module.device)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Inverter, *args) -> None:
        """Average after an optimiser step; a batch may only accumulate gradients."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.average.step(self._trained.values())

    def on_validation_start(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Put the averaged weights into the model."""
        if self.average is not None:
            self.average.store(self._trained.values())
            self.average.copy_to(self._trained.values())

    def on_validation_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Restore the weights of training."""
        if self.average is not None:
            self.average.restore(self._trained.values())

    def on_fit_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Leave the averaged weights in the model."""
        self.average.copy_to(self._trained.values())

    def state_dict(self) -> dict:
        """Return the averaged weights by name, and the number of steps."""
        return {
            "weights": dict(zip(self._trained, self.average.shadow_params, strict=True)),
            "num_averaged": self.average.optimization_step,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the averaged weights of a checkpoint."""
        weights = [state_dict["weights"][name] for name in self._trained]
        self.average.load_state_dict(
            {"shadow_params": weights, "optimization_step": state_dict["num_averaged"]}
        )
