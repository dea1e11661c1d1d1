"""Guards of training: they end a run, on all ranks together, without losing what it has done."""

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from featinv.models.featinv import FeatInv
from featinv.training.checkpointing import SaveLast
from featinv.utils.distributed import gather_objects
from featinv.utils.errors import InputError, listing, unknown

log = logging.getLogger(__name__)

PARENT = "FEATINV_PARENT"  # environment variable: process number of the rank that starts others


class StopOnSignal(L.Callback):
    """Save and end before the next batch when a signal comes, on whatever rank.

    The run ends with the exit code that a shell gives to the signal, 128 plus its number, so that
    a job script can tell it from a failure. Ctrl-C for the second time ends it at once.

    Args:
        signals: Names of signals: SIGTERM comes from `kill`, `scancel` and a preemption, SIGINT
            from Ctrl-C, and others from `sbatch --signal`.

    Raises:
        InputError: There is no such signal, or it cannot be caught.
    """

    def __init__(self, signals: Sequence[str] = ("SIGINT", "SIGTERM", "SIGUSR1")) -> None:
        catchable = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
        for name in signals:
            if name not in catchable:
                raise unknown("signal", name, sorted(catchable))
        self.signals = [signal.Signals[name] for name in signals]
        self._received = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: FeatInv) -> None:
        """Catch the signals; Lightning gives them their former meaning back in the end."""
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            for number in self.signals:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("%s: saving after this batch", signal.Signals(number).name)
        self._received = number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: FeatInv, *args) -> None:
        """End if any rank has received a signal; `SaveLast` then saves."""
        received = torch.tensor(self._received, device=pl_module.device)
        if number := int(trainer.strategy.reduce(received, reduce_op="max")):
            # Lightning kills the main process when one that it started ends with another code.
            raise SIGTERMException(128 + number if trainer.is_global_zero else 0)


def end_together(local_rank: int) -> None:
    """Make the ranks that Lightning starts from this process end with it.

    If it is killed while they look for each other, they would wait for half an hour. (Torchrun and
    Slurm see to this themselves.)

    Args:
        local_rank: This process' number on its machine; 0 is the one that starts the others.
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


class FiniteLoss(L.Callback):
    """End at the first loss that is not a finite number, and say what to look at."""

    def on_train_batch_start(self, trainer: L.Trainer, *args) -> None:
        """Remember the step that the batch belongs to."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: FeatInv, outputs: dict, batch: dict, *args
    ) -> None:
        """Raise an `InputError` if the loss of any rank is not finite."""
        finite = bool(outputs["loss"].isfinite())
        if not trainer.strategy.reduce_boolean_decision(not finite, all=False):
            return
        told = gather_objects(None if finite else (float(outputs["loss"]), batch["key"]))
        if not trainer.is_global_zero:
            raise SystemExit(0)  # rank 0 says it
        losses, keys = zip(*filter(None, told), strict=True)
        saves = [c.good(trainer) for c in trainer.checkpoint_callbacks if isinstance(c, SaveLast)]
        raise InputError(
            f"The loss is {losses[0]} at step {self._step}, on the batch with the keys "
            f"{listing(sum(keys, []), limit=32)}: expected a finite number, as with a lower "
            f"model.optimizer.lr or trainer.precision=32-true; {'; '.join(saves)}"
        )
