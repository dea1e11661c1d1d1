"""Data modules of single pictures (files, or images in memory) that can be read in any order."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from featinv.data.base import Broken, ImageDataModule, Loader, Shares, TrainBatches
from featinv.data.images import decode, eval_view
from featinv.utils.errors import InputError, listing
from featinv.utils.seeding import Draw, make_generator

MAX_TRIES = 16  # unreadable pictures in a row before training gives up


@dataclass(frozen=True, slots=True)
class Picture:
    """A labelled picture: a file, or an image in memory."""

    key: str
    label: int
    source: Path | Image.Image

    def open(self) -> Image.Image:
        """Return the picture as RGB; raise an `InputError` if it cannot be read."""
        return decode(self.source) if isinstance(self.source, Path) else self.source


class TrainPictures(Dataset):
    """Item n of the endless stream: a random view of the n-th picture, shuffled anew each epoch.

    An unreadable picture is replaced by the next one of the epoch, so batches keep their size.
    """

    def __init__(self, pictures: Sequence[Picture], view: partial, seed: int) -> None:
        self.pictures, self.view, self.seed = pictures, view, seed
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> list[int]:
        generator = make_generator(self.seed, Draw.ORDER, epoch)
        return torch.randperm(len(self.pictures), generator=generator).tolist()

    def __getitem__(self, n: int) -> list[Broken | dict]:
        epoch, position = divmod(n, len(self.pictures))
        broken: list[Broken] = []
        for attempt in range(min(MAX_TRIES, len(self.pictures))):
            order = self._order(epoch)
            picture = self.pictures[order[(position + attempt) % len(order)]]
            try:
                image = picture.open()
            except InputError as error:
                broken.append(Broken(picture.key, str(error)))
                continue
            view = self.view(image, make_generator(self.seed, Draw.CROP, n))
            sample = {"image": view, "label": picture.label, "index": n, "key": picture.key}
            return [*broken[:1], sample]  # the next ones are reported when their turn comes
        raise InputError(
            f"{len(broken)} pictures in a row cannot be read: {listing(b.key for b in broken)}."
        )


class EvalPictures(Dataset):
    """One rank's share of some positions in an evaluation set."""

    def __init__(
        self, pictures: Sequence[Picture], size: int, shares: Shares, positions: Sequence[int]
    ) -> None:
        self.pictures, self.size = pictures, size
        self.positions = positions[shares.rank :: shares.world]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> list[Broken | dict]:
        position = self.positions[i]
        picture = self.pictures[position]
        try:
            view = eval_view(picture.open(), self.size)
        except InputError as error:
            return [Broken(picture.key, str(error))]
        return [{"image": view, "label": picture.label, "index": position, "key": picture.key}]


class PictureDataModule(ImageDataModule):
    """Base of the modules that know all their pictures beforehand."""

    @abstractmethod
    def train_pictures(self) -> Sequence[Picture]:
        """Return the pictures to train on, in a fixed order."""

    @abstractmethod
    def eval_pictures(self) -> Sequence[Picture]:
        """Return the evaluation set in its order."""

    def limited(self, total: int, number: int) -> list[int]:
        """Return the positions that a limited evaluation takes: evenly spaced ones.

        So it sees all classes, which stand one after the other.
        """
        return [i * total // number for i in range(number)]

    def epoch_size(self) -> int:
        """See `ImageDataModule`."""
        return len(self.train_pictures())

    def make_train_loader(self, shares: Shares, first_batch) -> Loader:
        """See `ImageDataModule`: the stream depends on the seed only."""
        return Loader(
            TrainPictures(self.train_pictures(), self.view, self.seed),
            first_batch=first_batch,
            batch_sampler=TrainBatches(self.batch_size, shares),
            num_workers=self.num_workers,
        )

    def make_eval_loader(self, shares: Shares, limit: int | None) -> Loader:
        """See `ImageDataModule`: rank r takes items r, r + world, ..."""
        pictures = self.eval_pictures()
        total = len(pictures)
        positions = self.limited(total, min(total, limit or total))
        return Loader(
            EvalPictures(pictures, self.image_size, shares, positions),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
