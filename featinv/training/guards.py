"""Guards: end a run on all ranks together, without losing its progress."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from featinv.models.base import Inverter
from featinv.training.checkpointing import Interruption, SaveLast
from featinv.utils.distributed import gather_objects
from featinv.utils.errors import InputError, listing, unknown

log = logging.getLogger(__name__)

PARENT = "FEATINV_PARENT"  # environment variable: id of the process that starts the other ranks


class Batch(NamedTuple):
    """A batch whose loss has not been checked yet."""

    step: int
    keys: list[str]
    loss: Tensor  # divided by the number of accumulated batches; still on the device


class Guard(L.Callback):
    """Log the loss; end the run if it is not finite, or on a signal.

    Reading a loss waits for the GPU, so losses are checked together: at the steps that are logged
    (`trainer.log_every_n_steps`), before a validation, before a checkpoint and at the end. The same
    message tells all ranks of the signals that any has received. A broken state is never saved.

    On a signal the run ends between two optimiser steps, saved by `SaveLast`, with exit code 128
    plus the signal's number, as in a shell, so that job scripts can distinguish it from a failure.
    A second Ctrl-C ends it at once.

    Args:
        signals: Names of signals: SIGTERM comes from `kill`, `scancel` and preemptions, SIGINT from
            Ctrl-C, and others from `sbatch --signal`.

    Raises:
        InputError: An unknown signal, or one that cannot be caught; in training, a loss or weights
            that are not finite.
    """

    def __init__(self, signals: Sequence[str] = ("SIGINT", "SIGTERM", "SIGUSR1")) -> None:
        catchable = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
        for name in signals:
            if name not in catchable:
                raise unknown("signal", name, sorted(catchable))
        self.signals = [signal.Signals[name] for name in signals]
        self._received = 0  # signal that this rank received
        self._agreed = 0  # signal that any rank received, known to all
        self._batches: list[Batch] = []
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Catch the signals; Lightning restores their handlers in the end."""
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            for number in self.signals:
                signal.signal(number, self._note)
        if signal.SIGTERM in self.signals:
            # Lightning would synchronise all ranks before every batch.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("%s: saving after this step", signal.Signals(number).name)
        self._received = number

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Inverter, batch: dict, batch_idx: int
    ) -> None:
        """End between two steps if there was a signal."""
        self._step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._end_at_signal(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Inverter, outputs: dict, batch: dict, batch_idx: int
    ) -> None:
        """Keep the loss; at the end of a logged step, check all losses and log the step's."""
        self._batches.append(Batch(self._step, batch["key"], outputs["loss"]))
        step = trainer.global_step
        if step > self._step and step % trainer.log_every_n_steps == 0:
            loss = sum(self._check(trainer)[-trainer.accumulate_grad_batches :])
            # A CPU tensor: Lightning would make one on the device, and wait for it.
            pl_module.log("train/loss", torch.tensor(loss), prog_bar=True, batch_size=1)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Check before spending time on a validation."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Inverter, checkpoint: dict) -> None:
        """Check losses and weights, which the step after a finite loss may break."""
        self._check(trainer)
        weights = list(pl_module.trained().parameters())
        if not torch.nn.utils.get_total_norm(weights).isfinite():
            _fail(
                trainer,
                f"The weights are not finite after step {trainer.global_step - 1}: expected finite "
                "gradients, as with a lower model.optimizer.lr",
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """Check the last batches."""
        self._check(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Inverter) -> None:
        """End on a signal of the last step: what follows training may take long."""
        self._end_at_signal(trainer)

    def _check(self, trainer: L.Trainer) -> list[float]:
        """Return the losses of the batches since the last check, means over the ranks.

        Raises:
            InputError: One of them is not finite.
        """
        batches, self._batches = self._batches, []
        if not batches:  # the same on all ranks
            return []
        losses = torch.stack([batch.loss.float() for batch in batches])
        message = torch.cat([losses, losses.new_full((1,), self._received)])
        gathered = trainer.strategy.all_gather(message).view(trainer.world_size, -1)
        *losses, received = gathered.T.tolist()  # for each batch, by rank; waits for the GPU
        self._agreed = int(max(received))
        for batch, of_ranks in zip(batches, losses, strict=True):
            if not all(map(math.isfinite, of_ranks)):
                pairs = zip(of_ranks, gather_objects(batch.keys), strict=True)
                broken = [(loss, keys) for loss, keys in pairs if not math.isfinite(loss)]
                keys = sum((keys for _, keys in broken), [])
                _fail(
                    trainer,
                    f"The loss is {broken[0][0]} at step {batch.step}, on the batch with the keys "
                    f"{listing(keys, limit=32)}: expected a finite number, as with a lower "
                    "model.optimizer.lr or trainer.precision=32-true",
                )
        return [sum(of_ranks) / trainer.world_size for of_ranks in losses]

    def _end_at_signal(self, trainer: L.Trainer) -> None:
        number = self._received if trainer.world_size == 1 else self._agreed
        if number:
            # Lightning kills the main process if one that it started ends with another code.
            raise Interruption(128 + number if trainer.is_global_zero else 0)


def _fail(trainer: L.Trainer, sentence: str) -> None:
    """End all ranks, the first with an `InputError` that says how to resume."""
    if not trainer.is_global_zero:
        raise SystemExit(0)
    saves = [c.last_good(trainer) for c in trainer.checkpoint_callbacks if isinstance(c, SaveLast)]
    raise InputError("; ".join([sentence, *saves]))


def end_together(local_rank: int) -> None:
    """Make the ranks that Lightning starts from this process end with it.

    Otherwise, if it is killed while they wait for each other to connect, they hang for half an
    hour. Torchrun and Slurm take care of this themselves.

    Args:
        local_rank: This process's number on its machine; 0 starts the others.
    """
    if local_rank == 0:
        os.environ[PARENT] = str(os.getpid())
        return

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if PARENT in os.environ:
        threading.Thread(target=watch, args=(int(os.environ[PARENT]),), daemon=True).start()
