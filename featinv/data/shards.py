"""WebDataset tar shards, local, over HTTP or on the hub: KEY.jpg (or jpeg, png, webp), KEY.cls."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featinv.data.base import ImageDataModule, Loader, RankShare
from featinv.data.shard_streams import EvalShards, Position, TrainShards
from featinv.data.tars import expand_shards
from featinv.utils.distributed import gather_objects
from featinv.utils.errors import InputError, at_least, listing

log = logging.getLogger(__name__)


class ShardsDataModule(ImageDataModule):
    """WebDataset shards; training is endless and resumable, evaluation exact.

    Each pass deals the training shards to the (rank, worker) pairs like cards, in a new order. A
    pair reads its shards one by one, in blocks of `shuffle_buffer` records; the seed and the
    position of a block determine its permutation. So a position in the stream is a few numbers, and
    resuming rereads at most the shard in which a pair stopped. Blocks do not mix shards: shuffle
    samples before packing them, as `featinv-convert pack` does.

    A checkpoint holds the positions of all pairs at the last optimiser step. The batch size and the
    accumulation may change on resuming; the seed, `shuffle_buffer` and the numbers of shards, ranks
    and workers may not. A run from an old checkpoint without positions goes on with a new pass.

    Evaluation is in the order of the shards: each (rank, worker) reads all of them and decodes its
    own samples only. A limited evaluation takes the first samples, and reads no further.

    Truncated shards and undecodable images are skipped, counted and named; more than 5 % of them
    are an error. Without a `cls` member the label is -1; other members are ignored.

    Args:
        train_shards: Paths or URLs (http, https, or hf://datasets/OWNER/NAME/... for the Hugging
            Face hub) with braces (`{0000..0007}`), or globs of paths; one or several; None if there
            is nothing to train on.
        val_shards: The same for evaluation.
        root: Folder or URL that relative paths start from.
        shuffle_buffer: Records in a block, which each (rank, worker) holds in memory.
        num_train_images: Samples in the training shards, an epoch; None if unknown.
        num_classes: Classes in the evaluation shards: with `per_class`, reading ends once all are
            complete. If None, all shards are read.
        **options: See `ImageDataModule`.

    Raises:
        InputError: A pattern matches nothing; later, more ranks times workers than training shards,
            or a checkpoint of another stream.
    """

    def __init__(
        self,
        *,
        train_shards: str | Sequence[str] | None = None,
        val_shards: str | Sequence[str] | None = None,
        root: str | Path = "",
        shuffle_buffer: int = 1000,
        num_train_images: int | None = None,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_train_images, self.num_classes = num_train_images, num_classes
        self.train_shards = expand_shards(train_shards, str(root))
        self.val_shards = expand_shards(val_shards, str(root))
        self.shuffle_buffer = at_least("shuffle_buffer", shuffle_buffer, 1)
        # Positions of this rank's workers at the last counted optimiser step, starting with the
        # next one to yield; and the position after each batch since then.
        self._positions: deque[Position] = deque()
        self._given: deque[Position] = deque()

    def epoch_size(self) -> int:
        """See `ImageDataModule`.

        Raises:
            InputError: `num_train_images` is None.
        """
        if self.num_train_images is None:
            raise InputError(
                "The number of training images is not known: set data.num_train_images, or "
                "trainer.max_steps instead of epochs."
            )
        return at_least("num_train_images", self.num_train_images, 1)

    def train_dataloader(self) -> Loader:
        """See `ImageDataModule`."""
        if not self.train_shards:
            raise InputError("train_shards is empty: expected tar files to train on.")
        (rank, world), workers = self._share(), max(1, self.num_workers)
        pairs = world * workers
        if pairs > len(self.train_shards):
            most = len(self.train_shards) // world
            fewer = f"set num_workers to {most} or lower, or " if most else ""
            raise InputError(
                f"{world} ranks x {workers} workers need {pairs} training shards, but there are "
                f"only {len(self.train_shards)}: {fewer}repack into more shards."
            )
        if not self._positions:
            done = math.ceil(self.samples_seen() / pairs)  # samples of each pair
            if done:
                log.warning(
                    "The checkpoint comes from an earlier version and holds no positions in the "
                    "shards: training goes on with a new pass, which repeats some samples"
                )
            mine = range(rank * workers, (rank + 1) * workers)
            epoch = done  # one that it cannot have reached
            self._positions.extend(Position(pair, done, epoch, 0, 0, 0) for pair in mine)
        dataset = TrainShards(
            self.train_shards, self.train_view, self.seed, self.shuffle_buffer, pairs
        )
        return TrainLoader(self, dataset)

    def eval_dataset(self, share: RankShare, limit: int | None) -> EvalShards:
        """See `ImageDataModule`: rank r takes samples r, r + world, ..."""
        if not self.val_shards:
            raise InputError("val_shards is empty: expected tar files to evaluate on.")
        return EvalShards(
            self.val_shards,
            self.eval_view,
            self.batch_size,
            share,
            self.per_class,
            self.num_classes,
            limit,
        )

    def begin(self) -> list[Position]:
        """Return where this rank's workers start, in the order in which they yield."""
        self._count_steps()
        self._given.clear()  # batches that were fetched, but not trained on
        return list(self._positions)

    def note(self, position: Position) -> None:
        """Note the position of the worker that has just yielded a batch."""
        self._given.append(position)
        self._count_steps()

    def _count_steps(self) -> int:
        batches = super()._count_steps()
        for _ in range(min(batches, len(self._given))):  # none in a checkpoint without positions
            self._positions.popleft()
            self._positions.append(self._given.popleft())
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples consumed, and the positions of all ranks' workers.

        All ranks must call this together, as when Lightning saves a checkpoint.
        """
        state = super().state_dict()
        positions = gather_objects([list(position) for position in self._positions])
        return state | {"stream": self._stream(), "positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the positions of a checkpoint.

        Raises:
            InputError: They are positions in another stream.
        """
        super().load_state_dict(state_dict)
        self._positions.clear()
        self._given.clear()
        if "positions" in state_dict:
            then, now = state_dict["stream"], self._stream()
            if changed := [f"{k} {now[k]} instead of {then[k]}" for k in now if now[k] != then[k]]:
                raise InputError(
                    f"The run cannot resume in the middle of its shards with {listing(changed)}: "
                    f"expected the same {', '.join(now)} as before; batch_size may change."
                )
            positions = state_dict["positions"][self._share().rank]
            self._positions.extend(Position(*numbers) for numbers in positions)

    def _stream(self) -> dict[str, int]:
        return {
            "ranks": self._share().world,
            "workers": max(1, self.num_workers),
            "shards": len(self.train_shards),
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }


class TrainLoader(Loader):
    """Starts at the data module's positions, and reports the position after each batch."""

    def __init__(self, module: ShardsDataModule, dataset: TrainShards) -> None:
        self.module = module
        super().__init__(dataset, batch_size=module.batch_size, num_workers=module.num_workers)

    def __iter__(self) -> Iterator[dict]:
        self.dataset.start = self.module.begin()
        for batch in super().__iter__():
            self.module.note(Position(*batch.pop("position")[-1].tolist()))
            yield batch
