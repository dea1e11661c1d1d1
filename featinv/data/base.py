"""Base of the data modules: options, the position in the stream, and unreadable samples."""

import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from featinv.data.images import INTERPOLATIONS, eval_view, train_view
from featinv.utils.errors import InputError, at_least, listing, unknown

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BROKEN = 0.05  # tolerated share of unreadable samples
MIN_READ = 40  # samples to read before checking that share
MAX_BROKEN_RUN = 16  # unreadable samples in a row that end training


class Broken(NamedTuple):
    """Placeholder in the stream for a sample, or the rest of a shard, that cannot be read."""

    key: str
    reason: str


class RankShare(NamedTuple):
    """This process's share of a stream: every `world`-th sample or batch, from `rank` on."""

    rank: int
    world: int


def check_broken(read: int, failures: int, keys: Iterable[str]) -> None:
    """Raise an `InputError`, which names the keys, if too many of the samples read were broken."""
    if failures > MAX_BROKEN * read:
        raise InputError(
            f"{failures} of {read} samples cannot be read, more than {MAX_BROKEN:.0%}: "
            f"{listing(keys, limit=10)}; check or repack the data."
        )


def report_broken(keys: Sequence[str]) -> None:
    """Log which samples were skipped, if any."""
    if keys:
        log.warning("Skipped %d unreadable samples: %s", len(keys), listing(keys, limit=10))


def collate(items: list[list]) -> tuple[dict | None, list[Broken]]:
    """Collate items, each a list of at most one sample and the `Broken` ones before it.

    Returns:
        The batch, or None if there is no sample; and the broken ones.
    """
    parts = [part for item in items for part in item]
    samples = [part for part in parts if isinstance(part, dict)]
    broken = [part for part in parts if isinstance(part, Broken)]
    return (default_collate(samples) if samples else None), broken


def first_of_each_class(
    items: Iterable[T],
    label: Callable[[T], int | None],
    per_class: int,
    num_classes: int | None = None,
) -> Iterator[T]:
    """Yield the first items of each class, in order.

    Args:
        items: Read no further than needed.
        label: Maps an item to its class, or to None if it is always to be yielded.
        per_class: Number of items of each class.
        num_classes: Number of classes; reading stops once all are complete. None reads all items.
    """
    taken: Counter[int] = Counter()
    complete = 0
    for item in items:
        c = label(item)
        if c is None or taken[c] < per_class:
            yield item
        if c is not None:
            taken[c] += 1
            complete += taken[c] == per_class
            if complete == num_classes:
                return


class Loader(DataLoader):
    """A `DataLoader` that leaves out broken samples, and counts and names them."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        options |= {"pin_memory": torch.cuda.is_available(), "worker_init_fn": ignore_signals}
        super().__init__(dataset, collate_fn=collate, **options)

    def __len__(self) -> int:
        # Lightning skips validation on a rank with an empty loader; the others would wait for it.
        return max(1, super().__len__())

    def __iter__(self) -> Iterator[dict]:
        read = failures = 0
        reasons: dict[str, str] = {}  # by key: an endless stream meets files again
        try:
            for batch, broken in super().__iter__():
                if broken and not reasons:
                    log.warning("Skipping unreadable samples, the first: %s", broken[0].reason)
                read += len(broken) + (0 if batch is None else len(batch["index"]))
                failures += len(broken)
                reasons.update(broken)
                if read >= MIN_READ:
                    check_broken(read, failures, reasons)
                if batch is not None:
                    yield batch
            check_broken(read, failures, reasons)
        except InputError as error:  # a worker wraps the sentence in a traceback
            raise InputError(str(error).strip().split("InputError: ")[-1]) from None
        finally:
            report_broken(list(reasons))


def ignore_signals(worker: int) -> None:
    """Make a worker process ignore all signals but its parent's SIGTERM.

    Ctrl-C and Slurm signal every process of a run, which could not save without its workers.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell the sender
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # for all threads to come

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class ImageDataModule(L.LightningDataModule, ABC):
    """Base of the data modules: batches of square uint8 pictures for training and evaluation.

    A batch is a dict with `image` (uint8 in [0, 255], shape (B, 3, image_size, image_size)),
    `label` (int64, shape (B,), -1 if unknown), `index` (int64, shape (B,): number in the training
    stream, or position in the evaluation set), `key` (list of B strings) and `photograph` (list of
    B strings, what confidence intervals resample: the key, unless several crops share one).

    Training is endless: use `Trainer(max_steps=..., check_val_every_n_epoch=None,
    use_distributed_sampler=False)` with an integer `val_check_interval`. Validation is exact over
    ranks: no padding, no duplicates.

    The state in a Lightning checkpoint is the number of samples that all ranks together have
    consumed up to the last optimiser step. A resumed run goes on with the next sample, and may
    change its batch size, accumulation and number of ranks. For an old checkpoint without a state,
    the steps so far count as steps of the current size.

    Args:
        image_size: Side of the pictures in pixels, at least 8.
        batch_size: Samples per device and micro batch.
        seed: Determines the order and the crops of the training stream.
        num_workers: Worker processes per loader; 0 loads in the main process.
        min_scale: Minimal share of a picture's area in a training crop, in (0, 1].
        vertical_flip: Whether training also flips upside down, as in the paper's recipe.
        interpolation: `"bicubic"` or `"bilinear"`, for all views; the paper's recipe is bilinear.
        num_val_images: Number of images of the evaluation set for validation.
        per_class: Take only the first images of each class for evaluation, ten in the paper
            (unlabelled images are one class); all images if None.
        max_images: Number of images of `test_dataloader`; the whole evaluation set if None.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        min_scale: float = 0.08,
        vertical_flip: bool = False,
        interpolation: str = "bicubic",
        num_val_images: int = 64,
        per_class: int | None = None,
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        self.image_size = at_least("image_size", image_size, 8)
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.seed = at_least("seed", seed, 0)
        self.num_workers = at_least("num_workers", num_workers, 0)
        self.num_val_images = at_least("num_val_images", num_val_images, 1)
        self.per_class = None if per_class is None else at_least("per_class", per_class, 1)
        self.max_images = None if max_images is None else at_least("max_images", max_images, 1)
        if not 0 < min_scale <= 1:
            raise InputError(f"min_scale is {min_scale}: expected above 0 and up to 1, as 0.08 is.")
        if interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", interpolation, INTERPOLATIONS)
        self.eval_view = partial(eval_view, size=image_size, interpolation=interpolation)
        self.train_view = partial(
            train_view,
            size=image_size,
            min_scale=min_scale,
            vertical_flip=vertical_flip,
            interpolation=interpolation,
        )
        self._step = self._samples = 0  # optimiser steps counted so far, and their samples

    @abstractmethod
    def train_dataloader(self) -> Loader:
        """Return this rank's endless training stream; a new iterator continues it."""

    @abstractmethod
    def eval_dataset(self, share: RankShare, limit: int | None) -> Dataset:
        """Return one rank's share of the evaluation set, or of `limit` samples of it."""

    @abstractmethod
    def epoch_size(self) -> int:
        """Return the number of samples in one pass over the training set."""

    def make_eval_loader(self, share: RankShare, limit: int | None) -> Loader:
        """Return one rank's loader of the evaluation set, or of `limit` samples of it."""
        return Loader(
            self.eval_dataset(share, limit),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> Loader:
        """Return `num_val_images` fixed images of the evaluation set, shared by the ranks."""
        return self.make_eval_loader(self._share(), self.num_val_images)

    def test_dataloader(self) -> Loader:
        """Return the evaluation set, or `max_images` fixed images of it, whole on every rank.

        `featinv.evaluation.evaluator.Evaluator` divides the work among the ranks.
        """
        return self.make_eval_loader(RankShare(0, 1), self.max_images)

    def transfer_batch_to_device(self, batch: dict, device: torch.device, *args) -> dict:
        """Move a batch, except for `index`, which seeds generators on the CPU.

        Reading it from the device would wait for all pending work there.
        """
        index = batch["index"]
        return super().transfer_batch_to_device(batch, device, *args) | {"index": index}

    def setup(self, stage: str) -> None:
        """Start from the first sample, unless the trainer has trained before."""
        if self.trainer.global_step == 0:  # a checkpoint's state is loaded afterwards
            self.load_state_dict({"step": 0, "samples": 0})

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples consumed up to the last optimiser step."""
        self._count_steps()
        return {"step": self._step, "samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples of a checkpoint."""
        self._step, self._samples = state_dict["step"], state_dict["samples"]

    def samples_seen(self) -> int:
        """Return the number of samples that all ranks consumed up to the last optimiser step."""
        self._count_steps()
        return self._samples

    def _count_steps(self) -> int:
        """Count the samples of new optimiser steps; return the number of their micro batches."""
        if self.trainer is None:
            return 0
        steps = self.trainer.global_step - self._step
        batches = steps * self.trainer.accumulate_grad_batches
        self._step += steps
        self._samples += batches * self.batch_size * self.trainer.world_size
        return batches

    def _share(self) -> RankShare:
        if self.trainer is None:
            return RankShare(0, 1)
        return RankShare(self.trainer.global_rank, self.trainer.world_size)
