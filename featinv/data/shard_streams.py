"""Streams of tar shards in a worker: shuffled for training, in order for evaluation."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, islice
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from featinv.data.base import MAX_BROKEN_RUN, Broken, RankShare, first_of_each_class
from featinv.data.tars import decode_record, label_of, read_shard
from featinv.utils.errors import InputError, listing
from featinv.utils.seeding import Draw, make_generator


class Position(NamedTuple):
    """Position in the stream of one (rank, worker) pair, at the end of a batch."""

    pair: int  # rank * workers + worker: has the shards pair, pair + pairs, ... of a pass
    samples: int  # yielded so far
    epoch: int  # pass over the shards
    shard: int  # among the pair's in this pass
    block: int  # in this shard
    record: int  # the next one in the shuffled block


class TrainShards(IterableDataset):
    """The endless streams of one rank's workers; each sample carries the position after it.

    Args:
        urls: The shards.
        view: Takes a picture and a generator.
        seed: Determines the order of the shards and records, and the views.
        block_size: Records that are shuffled among each other.
        pairs: Ranks times workers.

    Attributes:
        start: Positions of this rank's workers, in the order in which they yield.
    """

    def __init__(
        self, urls: Sequence[str], view: partial, seed: int, block_size: int, pairs: int
    ) -> None:
        self.urls, self.view, self.seed = urls, view, seed
        self.block_size, self.pairs = block_size, pairs
        self.start: list[Position] = []

    def __iter__(self) -> Iterator[list[Broken | dict]]:
        start = self.start[this_worker()[0]]
        samples, broken = start.samples, []
        for place, record in self.records(start):
            index = samples * self.pairs + start.pair
            view = partial(self.view, generator=make_generator(self.seed, Draw.CROP, index))
            sample = decode_record(record, view, index)
            if isinstance(sample, Broken):
                broken.append(sample)
                if len(broken) == MAX_BROKEN_RUN:
                    names = listing(b.key for b in broken)
                    raise InputError(f"{len(broken)} samples in a row cannot be read: {names}.")
                continue
            samples += 1
            sample["position"] = torch.tensor((start.pair, samples, *place))
            yield [*broken, sample]
            broken = []

    def records(self, start: Position) -> Iterator[tuple[tuple[int, ...], dict | Broken]]:
        """Yield the shuffled records from a position on, with the place (epoch, ...) after each."""
        blocks = self._blocks(start)
        place, incoming = next(blocks)
        block, skipped = list(incoming), start.record
        while True:
            generator = make_generator(self.seed, Draw.SHUFFLE, start.pair, *place)
            order = torch.randperm(len(block), generator=generator).tolist()
            coming_place, incoming = next(blocks)
            coming: list[dict | Broken] = []
            for number, i in enumerate(order[skipped:], start=skipped + 1):
                yield (*place, number), block[i]
                # Make room for a record of the next block: reading and decoding take turns, or a
                # server would close a connection that is idle for the time of a block.
                block[i] = None
                coming += islice(incoming, 1)
            coming += incoming
            place, block, skipped = coming_place, coming, 0

    def _blocks(self, start: Position) -> Iterator[tuple[tuple[int, int, int], Iterator]]:
        """Yield each block's place and records, which must be read before the next block."""
        first_shard, block = start.shard, start.block
        for epoch in count(start.epoch):
            generator = make_generator(self.seed, Draw.ORDER, epoch)
            order = torch.randperm(len(self.urls), generator=generator).tolist()
            urls = [self.urls[i] for i in order[start.pair :: self.pairs]]
            empty = True
            for shard in range(first_shard, len(urls)):
                records = islice(read_shard(urls[shard]), block * self.block_size, None)
                for first in records:
                    rest = islice(records, self.block_size - 1)
                    yield (epoch, shard, block), chain([first], rest)
                    block += 1
                    empty = False
                block = 0
            if empty:  # otherwise the search would never end
                raise InputError(f"No samples in {listing(urls)}: expected KEY.jpg and KEY.cls.")
            first_shard = 0


class EvalShards(IterableDataset):
    """One rank's share of the evaluation set; each of its W workers decodes every W-th batch.

    Args:
        urls: The shards.
        view: Takes a picture.
        batch_size: Samples per batch of the loader.
        share: This rank's share.
        per_class: See `ImageDataModule`.
        num_classes: See `ShardsDataModule`.
        limit: Samples of all ranks together, or None.
    """

    def __init__(
        self,
        urls: Sequence[str],
        view: partial,
        batch_size: int,
        share: RankShare,
        per_class: int | None,
        num_classes: int | None,
        limit: int | None,
    ) -> None:
        self.urls, self.view, self.batch_size, self.share = urls, view, batch_size, share
        self.per_class, self.num_classes, self.limit = per_class, num_classes, limit

    def __iter__(self) -> Iterator[list[Broken | dict]]:
        worker, workers = this_worker()
        records = chain.from_iterable(map(read_shard, self.urls))
        if self.per_class is not None:
            records = first_of_each_class(records, label_of, self.per_class, self.num_classes)
        pending: list[Broken] = []  # truncated shards, reported with the next sample
        position = 0
        for record in records:
            if isinstance(record, Broken):
                pending += [record] if worker == 0 else []
                continue
            # The loader takes turns among the workers by batches: this keeps the order.
            turn, rank = divmod(position, self.share.world)
            if rank == self.share.rank and turn // self.batch_size % workers == worker:
                yield [*pending, decode_record(record, self.view, position)]
                pending = []
            position += 1
            if position == self.limit:
                break
        if position == 0 and not pending:
            raise InputError(f"No samples in {listing(self.urls)}: expected KEY.jpg and KEY.cls.")
        if pending:
            yield pending


def this_worker() -> tuple[int, int]:
    """Return this process's worker number and the number of workers, (0, 1) in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
