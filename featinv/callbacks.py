"""Callbacks of training: averaged weights, checkpoints, sample grids and the progress bar."""

import logging
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import AveragedModel

from featinv.checkpoints import WholeFiles
from featinv.data.base import at_least
from featinv.errors import InputError
from featinv.metrics import spatial_cosine
from featinv.module import FeatInv
from featinv.pixels import from_uint8, resize, to_uint8
from featinv.ranks import gather, share_rows
from featinv.report import sample_grid, save_png

log = logging.getLogger(__name__)


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


class SampleGrid(L.Callback):
    """Invert a few fixed held-out images at every validation: a picture and two numbers.

    `val/feature_cosine` is the spatial feature cosine between originals and reconstructions,
    `val/feature_cosine_shuffled` the same for reconstructions from another image's features. A
    run that ignores its condition is seen early: the two stay equal.

    Args:
        folder: Where the grids are written.
        num_images: How many images, from the start of the validation set; 2 or more.
        num_steps: Denoising steps.

    Raises:
        InputError: A value out of its range.
    """

    def __init__(self, folder: str, num_images: int = 8, num_steps: int = 10) -> None:
        self.folder = Path(folder)
        self.num_images = at_least("sample_grid.num_images", num_images, 2)
        self.num_steps = at_least("sample_grid.num_steps", num_steps, 1)
        self._images: dict[int, torch.Tensor] = {}  # by their position in the validation set

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: FeatInv, outputs, batch: dict, *args
    ) -> None:
        """Collect the first images that this rank has of the validation set."""
        missing = self.num_images - len(self._images)
        indices = batch["index"][:missing].tolist()
        self._images |= dict(zip(indices, batch["image"], strict=False))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Draw, measure, save and log."""
        images = self._first_images(pl_module.device)
        if trainer.sanity_checking:
            return
        features = pl_module.backbone.features(from_uint8(images))
        options = {"num_steps": self.num_steps} if hasattr(pl_module, "sampler") else {}
        drawn = share_rows(
            lambda rows: to_uint8(pl_module.invert(features[rows], indices=rows, **options)[:, 0]),
            len(images),
        )
        drawn = from_uint8(drawn)
        if pl_module.conditioning != "none":
            drawn_features = pl_module.backbone.features(drawn)
            # A reconstruction from the features of the image before: drawn already, one place on.
            cosine = spatial_cosine(features, drawn_features).mean()
            cosine_shuffled = spatial_cosine(features, drawn_features.roll(1, 0)).mean()
            values = {
                "val/feature_cosine": cosine,
                "val/feature_cosine_shuffled": cosine_shuffled,
            }
            pl_module.log_dict(values, sync_dist=True, batch_size=1)  # the same on all ranks
        if trainer.is_global_zero:
            originals = resize(from_uint8(images), pl_module.image_size)
            grid = sample_grid(to_uint8(originals).cpu(), to_uint8(drawn).cpu())
            save_png(grid, self.folder / f"step_{trainer.global_step:07d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("val/reconstructions", [grid.permute(1, 2, 0).numpy()])

    def _first_images(self, device: torch.device) -> torch.Tensor:
        """Return the first images of the validation set, whichever ranks had them."""
        # A rank may have had none: then its tensors have no rows, and the others' size.
        images = torch.stack(list(self._images.values()) or [torch.empty(0, 0, 0)]).byte()
        indices = torch.tensor(list(self._images), dtype=torch.int64)
        self._images = {}
        images = [part for part in gather(images.to(device)) if part.numel()]
        order = torch.cat(gather(indices.to(device))).argsort()
        return torch.cat(images)[order[: self.num_images]]


class SaveLast(Checkpoint):
    """Save the whole training state every so many optimiser steps, and at the end.

    The previous checkpoint is there until the next one is whole. What is not worth resuming from,
    weights that are not finite, is never saved over it.

    Args:
        path: The checkpoint file, overwritten each time.
        every_n_steps: Optimiser steps between two saves.

    Raises:
        InputError: `every_n_steps` is below 1; on saving, no room on the disk, or weights that are
            not finite.
    """

    def __init__(self, path: str, every_n_steps: int = 500) -> None:
        self.path = path
        self.every_n_steps = at_least("save_last.every_n_steps", every_n_steps, 1)
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: FeatInv, stage: str) -> None:
        """Make the trainer write whole files."""
        trainer.strategy.checkpoint_io = WholeFiles()

    def on_train_start(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Start counting from the step that training starts from."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: FeatInv, *args) -> None:
        """Save after an optimiser step (not every batch: gradients may accumulate)."""
        if trainer.global_step >= self._step + self.every_n_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Save the end of training."""
        if trainer.global_step > self._step:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: FeatInv, error: BaseException) -> None:
        """Save the state at an interruption by the user or by the cluster."""
        # Ranks agree on ending by a signal; Ctrl-C twice catches each somewhere else.
        alone = trainer.world_size == 1
        if isinstance(error, SIGTERMException) or (alone and isinstance(error, KeyboardInterrupt)):
            # What was begun after the last optimiser step is done again, from the same samples.
            batches = trainer.fit_loop.epoch_loop.batch_progress
            begun = batches.total.completed - trainer.global_step * trainer.accumulate_grad_batches
            for progress in (batches.total, batches.current):
                progress.completed -= begun
                progress.reset_on_restart()
            self.on_train_end(trainer, pl_module)
            if trainer.is_global_zero:
                log.warning(
                    "Interrupted after %d steps; go on with: python train.py resume=%s",
                    trainer.global_step,
                    trainer.default_root_dir,
                )

    def good(self, trainer: L.Trainer) -> str:
        """Say where the last good checkpoint is."""
        if not Path(self.path).exists():
            return "nothing was saved before."
        return (
            f"the last good checkpoint is '{self.path}', after {self._step} steps; go on with: "
            f"python train.py resume={trainer.default_root_dir}"
        )

    def _save(self, trainer: L.Trainer) -> None:
        weights = list(trainer.lightning_module.trained().parameters())
        if not torch.nn.utils.get_total_norm(weights).isfinite():
            raise InputError(
                f"The weights are not finite after step {trainer.global_step - 1}: expected finite "
                f"gradients, as with a lower model.optimizer.lr; {self.good(trainer)}"
            )
        trainer.save_checkpoint(self.path)
        self._step = trainer.global_step


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
