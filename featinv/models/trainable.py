"""TrainableInverter: base class of the inverters that Lightning trains."""

from collections.abc import Callable, Iterable

import lightning as L
import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from featinv.extractors import FeatureExtractor
from featinv.models.base import Inverter
from featinv.utils.distributed import gather
from featinv.utils.errors import InputError, at_least, unknown


class TrainableInverter(Inverter, L.LightningModule):
    """An inverter with trained modules: optimiser, schedule and checkpoints.

    A subclass makes its networks, then calls `freeze`.

    Args:
        backbone: The frozen encoder whose features are inverted.
        image_size: Side in pixels of the images that the model draws.
        conditioning: See `Inverter`.
        optimizer: Makes the optimiser from the trained parameters.
        lr_schedule: A schedule of `diffusers.optimization.get_scheduler`.
        warmup_steps: Optimiser steps of linear warm-up.
        seed: Seed of all that is random in training.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        image_size: int,
        conditioning: str,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        lr_schedule: str,
        warmup_steps: int,
        seed: int,
    ) -> None:
        super().__init__(backbone, image_size, conditioning)
        # A piecewise constant schedule needs rules that `get_scheduler` is not given here.
        schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
        if lr_schedule not in schedules:
            raise unknown("model.lr_schedule", lr_schedule, schedules)
        at_least("model.warmup_steps", warmup_steps, 0)
        at_least("seed", seed, 0)
        self.make_optimizer = optimizer
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self.seed = seed
        # A checkpoint holds the trained weights only, so it cannot be strict about the others;
        # `on_load_checkpoint` checks them instead.
        self.strict_loading = False
        self._val_losses: list[Tensor] = []

    def freeze(self) -> None:
        """Keep gradients off the frozen modules, and put all into training mode."""
        for module in self.frozen().values():
            module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "TrainableInverter":
        """Set the trained modules to training mode; frozen ones stay in eval mode."""
        super().train(mode)
        for module in self.frozen().values():
            module.eval()
        return self

    def setup(self, stage: str) -> None:
        """Let DDP send the trained weights from rank to rank, and nothing else.

        Buffers would be sent at every batch, also at those of an uneven validation.
        """
        trained = {name for name, _ in self.trained().named_parameters()}
        everything = [*self.named_parameters(), *self.named_buffers()]
        fixed = [name for name, _ in everything if name not in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over the images of all ranks, of which some may have had none."""
        losses = torch.cat([torch.empty(0, device=self.device), *self._val_losses])
        self._val_losses = []
        mean = torch.cat(gather(losses)).mean()  # the same on all ranks already
        self.log("val/loss", mean, sync_dist=True, batch_size=1, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return the optimiser of the trained parameters and its schedule over optimiser steps.

        Raises:
            InputError: A value that the optimiser refuses.
        """
        try:
            optimizer = self.make_optimizer(self.trained().parameters())
        except (TypeError, ValueError) as error:
            raise InputError(f"The values of model.optimizer do not fit: {error}.") from error
        # A fused optimiser would undo float16's loss scaling by itself, after clipping: Lightning
        # refuses to clip for one. With this flag, the scaling is undone before.
        optimizer._step_supports_amp_scaling = False
        schedule = get_scheduler(
            self.lr_schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.trainer.max_steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the trained weights, the config, and hashes of what is frozen."""
        prefixes = tuple(f"{name}." for name in self.trained())
        checkpoint["state_dict"] = {
            key: value
            for key, value in checkpoint["state_dict"].items()
            if key.startswith(prefixes)
        }
        checkpoint["featinv"] = {"config": self.config, "frozen": self.frozen_hashes()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse a checkpoint of another architecture or of other frozen weights."""
        self.check_frozen(checkpoint["featinv"]["frozen"])
        self.check_trained(checkpoint["state_dict"])
