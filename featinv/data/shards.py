"""WebDataset tar shards, local or over HTTP: KEY.jpg (or jpeg, png, webp) and KEY.cls."""

import random
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from http.client import HTTPException
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import httpx
import torch
import webdataset as wds
from braceexpand import braceexpand
from huggingface_hub import HfFileSystem
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from featinv.data.base import Broken, ImageDataModule, Loader, Shares
from featinv.data.images import decode, eval_view
from featinv.utils.errors import InputError, at_least, listing
from featinv.utils.files import describe_folder
from featinv.utils.seeding import Draw, make_generator

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
HUB = "hf://"
RETRY_PAUSES = (1, 5, None)  # seconds between the tries to open a URL; None gives up
LOOKAHEAD = 16  # records in a row that may be broken


class ShardsDataModule(ImageDataModule):
    """WebDataset shards; training is endless and resumable, evaluation exact.

    Training passes again and again over the shards, each pass in a fresh order that is dealt out
    to the (rank, worker) pairs, through a shuffle buffer. The stream is determined by the seed, the
    number of ranks and the number of workers; a resumed run with the same numbers sees exactly what
    an uninterrupted one would have seen (it reads, but does not decode, what was seen before).

    Evaluation takes the samples in the order of the shards: each (rank, worker) reads all shards
    and decodes only its own samples, so `index` is the position whatever their numbers. A limited
    evaluation takes the first samples; pack shards shuffled (`featinv.data.packer` does).

    Cut-off shards and undecodable images are skipped, counted and named; more than 5 % of them are
    an error. A missing `cls` is label -1; other members are ignored.

    Args:
        train_shards: Paths or URLs (http, https, or hf://datasets/OWNER/NAME/... for the Hugging
            Face hub) with braces (`{0000..0007}`), or globs of paths; one or several; None if there
            is nothing to train on.
        val_shards: The same for evaluation.
        root: Folder or URL that relative ones are relative to.
        shuffle_buffer: Records that each (rank, worker) shuffles among.
        num_train_images: Samples in the training shards, which define an epoch; None if unknown.
        **options: See `ImageDataModule`.

    Raises:
        InputError: A pattern matches nothing; later, more ranks times workers than training shards.
    """

    def __init__(
        self,
        *,
        train_shards: str | Sequence[str] | None = None,
        val_shards: str | Sequence[str] | None = None,
        root: str | Path = "",
        shuffle_buffer: int = 1000,
        num_train_images: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_train_images = num_train_images
        self.train_shards = expand_shards(train_shards, str(root))
        self.val_shards = expand_shards(val_shards, str(root))
        self.shuffle_buffer = at_least("shuffle_buffer", shuffle_buffer, 1)

    def epoch_size(self) -> int:
        """See `ImageDataModule`; shards do not tell how many samples they hold.

        Raises:
            InputError: `num_train_images` was not given.
        """
        if self.num_train_images is None:
            raise InputError(
                "The number of training images is not known: set data.num_train_images, or "
                "trainer.max_steps instead of epochs."
            )
        return at_least("num_train_images", self.num_train_images, 1)

    def make_train_loader(self, shares: Shares, first_batch: Callable[[], int]) -> Loader:
        """See `ImageDataModule`; the workers of all ranks divide the shards among them."""
        if not self.train_shards:
            raise InputError("train_shards is empty: expected tar files to train on.")
        workers = max(1, self.num_workers)
        if shares.world * workers > len(self.train_shards):
            raise InputError(
                f"{shares.world} ranks x {workers} workers need {shares.world * workers} training "
                f"shards, but there are only {len(self.train_shards)}: set num_workers to "
                f"{len(self.train_shards) // shares.world} or lower, or repack into more shards."
            )
        dataset = TrainShards(
            self.train_shards, self.view, self.batch_size, self.seed, self.shuffle_buffer, shares
        )
        return self._loader(dataset, first_batch=first_batch)

    def make_eval_loader(self, shares: Shares, limit: int | None) -> Loader:
        """See `ImageDataModule`: rank r takes samples r, r + world, ..."""
        if not self.val_shards:
            raise InputError("val_shards is empty: expected tar files to evaluate on.")
        dataset = EvalShards(self.val_shards, self.image_size, self.batch_size, limit, shares)
        return self._loader(dataset, persistent_workers=self.num_workers > 0)

    def _loader(self, dataset: IterableDataset, **options: Any) -> Loader:
        return Loader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, **options)


class TrainShards(IterableDataset):
    """One rank's endless stream; a worker yields the batches b with b % workers == worker.

    `first_batch` is the rank's number of the first batch that is wanted.
    """

    def __init__(
        self,
        urls: Sequence[str],
        view: partial,
        batch_size: int,
        seed: int,
        shuffle_buffer: int,
        shares: Shares,
    ) -> None:
        self.urls, self.view, self.batch_size, self.seed = urls, view, batch_size, seed
        self.shuffle_buffer, self.shares, self.first_batch = shuffle_buffer, shares, 0

    def __iter__(self) -> Iterator[list[Broken | dict]]:
        worker, workers = this_worker()
        # The loader asks worker 0 first, so after a resume the workers swap their roles.
        worker = (worker + self.first_batch) % workers
        batches_done = len(range(worker, self.first_batch, workers))
        first = batches_done * self.batch_size
        group, groups = self.shares.rank * workers + worker, self.shares.world * workers
        records = islice(self._records(group, groups), first, None)
        ahead = deque(islice(records, LOOKAHEAD))
        for number, following in zip(count(first), records, strict=False):
            yield self._read(ahead, index=number * groups + group)
            ahead.popleft()
            ahead.append(following)

    def _records(self, group: int, groups: int) -> Iterator[dict | Broken]:
        """Return the endless shuffled stream of undecoded records of one (rank, worker) pair."""
        state = make_generator(self.seed, Draw.SHUFFLE, group).initial_seed()
        shuffle = wds.shuffle(self.shuffle_buffer, rng=random.Random(state))
        return iter(shuffle(self._passes(group, groups)))

    def _passes(self, group: int, groups: int) -> Iterator[dict | Broken]:
        for number in count():
            order = torch.randperm(
                len(self.urls), generator=make_generator(self.seed, Draw.ORDER, number)
            )
            urls = [self.urls[i] for i in order[group::groups].tolist()]
            empty = True
            for record in chain.from_iterable(map(read_shard, urls)):
                empty = False
                yield record
            if empty:  # or it would search for ever
                raise InputError(f"No samples in {listing(urls)}: expected KEY.jpg and KEY.cls.")

    def _read(self, ahead: deque, index: int) -> list[Broken | dict]:
        """Decode the first readable of the coming records, so that batches keep their size."""
        broken: list[Broken] = []
        generator = make_generator(self.seed, Draw.CROP, index)
        for record in ahead:
            sample = decode_record(record, lambda image: self.view(image, generator), index)
            if not isinstance(sample, Broken):
                return [*broken[:1], sample]  # the next ones are reported in their own turn
            broken.append(sample)
        names = listing(b.key for b in broken)
        raise InputError(f"{len(broken)} samples in a row cannot be read: {names}.")


class EvalShards(IterableDataset):
    """One rank's share of the samples of all shards, each worker decoding every W-th batch."""

    def __init__(
        self,
        urls: Sequence[str],
        size: int,
        batch_size: int,
        limit: int | None,
        shares: Shares,
    ) -> None:
        self.urls, self.batch_size, self.limit, self.shares = urls, batch_size, limit, shares
        self.view = partial(eval_view, size=size)

    def __iter__(self) -> Iterator[list[Broken | dict]]:
        worker, workers = this_worker()
        pending: list[Broken] = []  # cut-off shards, which the next sample (or none) brings along
        position = 0
        for record in chain.from_iterable(map(read_shard, self.urls)):
            if position == self.limit:
                break
            if isinstance(record, Broken):
                pending += [record] if worker == 0 else []
                continue
            # Whole batches go round the workers, as the loader asks them: the order is kept.
            turn, rank = divmod(position, self.shares.world)
            if rank == self.shares.rank and turn // self.batch_size % workers == worker:
                yield [*pending, decode_record(record, self.view, position)]
                pending = []
            position += 1
        if position == 0 and not pending:
            raise InputError(f"No samples in {listing(self.urls)}: expected KEY.jpg and KEY.cls.")
        if pending:
            yield pending


def this_worker() -> tuple[int, int]:
    """Return this process' worker number and the number of workers; the main process is 0 of 1."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def read_shard(url: str) -> Iterator[dict | Broken]:
    """Yield the undecoded records of one shard; if it is cut off, a `Broken` one comes last.

    Raises:
        InputError: The shard cannot be opened at all.
    """
    with open_shard(url) as stream:
        try:
            yield from group_by_keys(read_members(stream, url))
        except Exception as error:  # tarfile, zlib and http have no common one
            yield Broken(url, f"Shard '{url}' is cut off or damaged: {error}.")


def read_members(stream: IO[bytes], url: str) -> Iterator[dict]:
    """Yield the files in a tar as webdataset's `group_by_keys` wants them.

    Unlike webdataset's own iterator, it notices an archive that ends between two members.
    """
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if member.isreg():
                data = tar.extractfile(member).read()
                yield {"fname": member.name, "data": data, "__url__": url}
            tar.members = []  # or it would remember every member
        if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")


def open_shard(url: str) -> IO[bytes]:
    """Open a shard for reading once, front to back."""
    for pause in RETRY_PAUSES if is_url(url) else (None,):
        try:
            if url.startswith(HUB):  # knows the token that gated data sets ask for
                return HfFileSystem().open(url, "rb", block_size=0)
            return urlopen(url, timeout=60) if is_url(url) else open(url, "rb")
        except (OSError, HTTPException, httpx.HTTPError) as error:
            gone = isinstance(error, FileNotFoundError)
            gone = gone or (isinstance(error, HTTPError) and error.code < 500)
            if pause is None or gone:
                raise InputError(f"Cannot open shard '{url}': {error}.") from error
            time.sleep(pause)


def decode_record(record: dict | Broken, view: Callable, index: int) -> dict | Broken:
    """Turn the bytes of one record into a sample, or say why that is not possible."""
    if isinstance(record, Broken):
        return record
    key = record["__key__"]
    name = f"{key} in {record['__url__']}"
    try:
        encoded = next((record[suffix] for suffix in IMAGE_SUFFIXES if suffix in record), None)
        if encoded is None:
            raise InputError(
                f"Sample '{name}' has no image: expected {' or '.join(IMAGE_SUFFIXES)}."
            )
        label = parse_label(record.get("cls", b"-1"), name)
        return {"image": view(decode(encoded, name)), "label": label, "index": index, "key": key}
    except InputError as error:
        return Broken(key, str(error))


def parse_label(text: bytes, name: str) -> int:
    """Return the class index that a `cls` member holds."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"Label of '{name}' is {text[:20]!r}: expected an integer.") from None


def is_url(pattern: str) -> bool:
    """Return whether a pattern is an http(s) URL, or on the Hugging Face hub."""
    return pattern.startswith(("http://", "https://", HUB))


def expand_shards(patterns: str | Sequence[str] | None, root: str = "") -> list[str]:
    """Expand braces and globs to a list of shards.

    Args:
        patterns: One pattern or several; None is none.
        root: Folder or http(s) URL that relative patterns are relative to.

    Returns:
        Paths and URLs, in order of the patterns; what a glob matches is sorted.

    Raises:
        InputError: A pattern is of a kind that is not read, or matches no file.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    shards = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or ("://" in pattern and not is_url(pattern)):
            raise InputError(
                f"Shards '{pattern}' cannot be read: expected local paths, http(s) or hf:// URLs; "
                "for other stores, download or mount them first."
            )
        names = list(braceexpand(pattern))
        if is_url(pattern) or is_url(root):
            prefix = "" if is_url(pattern) else root.rstrip("/") + "/"
            shards += [prefix + name for name in names]
        else:
            shards += _local_shards(pattern, [str(Path(root, name).expanduser()) for name in names])
    return shards


def _local_shards(pattern: str, paths: list[str]) -> list[str]:
    found = [[path] if Path(path).is_file() else sorted(glob(path)) for path in paths]
    if missing := [path for path, files in zip(paths, found, strict=True) if not files]:
        what = "match no file"
        if len(paths) > 1:
            what = f"lack {len(missing)} of {len(paths)} files, the first is '{missing[0]}'"
        there = describe_folder(Path(missing[0]).parent)
        raise InputError(f"Shards '{pattern}' {what}: {there}.")
    return list(chain.from_iterable(found))
