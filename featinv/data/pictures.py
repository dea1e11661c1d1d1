"""Data modules of pictures, as files or in memory, that can be read in any order."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import count
from operator import attrgetter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from featinv.data.base import (
    MAX_BROKEN_RUN,
    Broken,
    ImageDataModule,
    Loader,
    RankShare,
    first_of_each_class,
)
from featinv.data.images import decode
from featinv.utils.errors import InputError, listing
from featinv.utils.seeding import Draw, make_generator


@dataclass(frozen=True, slots=True)
class Picture:
    """A labelled picture: a file, or an image in memory."""

    key: str
    label: int
    source: Path | Image.Image
    photograph: str | None = None  # that it is a crop of

    def open(self) -> Image.Image:
        """Return the picture as RGB; raise an `InputError` if it cannot be read."""
        return decode(self.source) if isinstance(self.source, Path) else self.source

    def sample(self, view: Callable[[Image.Image], Tensor], index: int) -> dict:
        """Return a view of the picture as an item of a batch; raises as `open`."""
        return {
            "image": view(self.open()),
            "label": self.label,
            "index": index,
            "key": self.key,
            "photograph": self.photograph or self.key,
        }


class TrainBatches(Sampler[list[int]]):
    """One rank's batches of the endless stream of sample numbers 0, 1, 2, ...

    The ranks take turns, batch by batch: what an optimiser step sees does not depend on how it is
    split over ranks and micro batches. `first` returns the number to start from.
    """

    def __init__(self, batch_size: int, share: RankShare, first: Callable[[], int]) -> None:
        self.batch_size, self.share, self.first = batch_size, share, first

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first() + self.share.rank * self.batch_size
        for number in count(first, self.share.world * self.batch_size):
            yield list(range(number, number + self.batch_size))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> list[int]:
    """Return the order in which an epoch visits its pictures."""
    return torch.randperm(length, generator=make_generator(seed, Draw.ORDER, epoch)).tolist()


class TrainPictures(Dataset):
    """Item n of the endless stream: a random view of the n-th picture, reshuffled each epoch.

    An unreadable picture is replaced by the next one of the epoch, so batches keep their size.
    """

    def __init__(self, pictures: Sequence[Picture], view: partial, seed: int) -> None:
        self.pictures, self.view, self.seed = pictures, view, seed

    def __getitem__(self, n: int) -> list[Broken | dict]:
        epoch, position = divmod(n, len(self.pictures))
        order = epoch_order(self.seed, epoch, len(self.pictures))
        broken: list[Broken] = []
        for attempt in range(min(MAX_BROKEN_RUN, len(order))):
            picture = self.pictures[order[(position + attempt) % len(order)]]
            view = partial(self.view, generator=make_generator(self.seed, Draw.CROP, n))
            try:
                # Further broken ones are reported at their own turn.
                return [*broken[:1], picture.sample(view, n)]
            except InputError as error:
                broken.append(Broken(picture.key, str(error)))
        raise InputError(
            f"{len(broken)} pictures in a row cannot be read: {listing(b.key for b in broken)}."
        )


class EvalPictures(Dataset):
    """One rank's share of some positions in an evaluation set."""

    def __init__(
        self, pictures: Sequence[Picture], view: partial, share: RankShare, positions: Sequence[int]
    ) -> None:
        self.pictures, self.view = pictures, view
        self.positions = positions[share.rank :: share.world]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> list[Broken | dict]:
        position = self.positions[i]
        picture = self.pictures[position]
        try:
            return [picture.sample(self.view, position)]
        except InputError as error:
            return [Broken(picture.key, str(error))]


class PictureDataModule(ImageDataModule):
    """Base of the data modules that know all their pictures in advance."""

    # Found once: a large folder takes long to list, and photographs take memory.
    @cached_property
    def _train_pictures(self) -> Sequence[Picture]:
        return self.train_pictures()

    @cached_property
    def _eval_pictures(self) -> Sequence[Picture]:
        return self.eval_pictures()

    @abstractmethod
    def train_pictures(self) -> Sequence[Picture]:
        """Return the training pictures, in a fixed order."""

    @abstractmethod
    def eval_pictures(self) -> Sequence[Picture]:
        """Return the evaluation set, in its order."""

    def limit_positions(self, total: int, number: int) -> list[int]:
        """Return the positions of a limited evaluation: evenly spaced, to see all classes."""
        return [i * total // number for i in range(number)]

    def epoch_size(self) -> int:
        """See `ImageDataModule`."""
        return len(self._train_pictures)

    def train_dataloader(self) -> Loader:
        """See `ImageDataModule`; the stream depends on the seed alone."""
        return Loader(
            TrainPictures(self._train_pictures, self.train_view, self.seed),
            batch_sampler=TrainBatches(self.batch_size, self._share(), self.samples_seen),
            num_workers=self.num_workers,
        )

    def eval_dataset(self, share: RankShare, limit: int | None) -> EvalPictures:
        """See `ImageDataModule`; rank r takes items r, r + world, ..."""
        pictures = self._eval_pictures
        if self.per_class is not None:
            label = attrgetter("label")
            pictures = list(first_of_each_class(pictures, label, self.per_class))
        number = min(len(pictures), limit or len(pictures))
        positions = self.limit_positions(len(pictures), number)
        return EvalPictures(pictures, self.eval_view, share, positions)
