"""Pair each image of a stream with an image of another class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from featinv.utils.errors import InputError
from featinv.utils.seeding import Draw, make_generator

POOL = 32  # images kept to be paired with later ones
MAX_WAITING = 1000  # images held back for a second class; half a gigabyte at full scale
SEED = 0  # fixed: the floor is a property of the set of images


class Item(NamedTuple):
    """An image of the stream."""

    index: int  # in the data set
    label: int  # -1: unknown
    photograph: str
    own: Any  # what is compared of the image
    samples: Any  # what is compared of its reconstructions

    @property
    def group(self) -> int | str:
        """The class, or the photograph if the class is unknown."""
        return self.label if self.label >= 0 else self.photograph


class Pairing:
    """Pairs each image with one of another class, in one pass and bounded memory.

    Images are added one at a time in the order of the data set, so the batch size does not matter.
    Each is paired with a random earlier image, drawn from a pool of `POOL` images. The pool keeps
    the classes balanced: a new image replaces a random one of the largest class. Until a second
    class appears, images are held back; then they are paired with the new images one by one, so
    folders sorted by class work. An unknown class differs from any other photograph, but not from
    other crops of the same one.

    If there is only one class, or more than `MAX_WAITING` images are held back, an image is paired
    with another photograph of its own class.

    Attributes:
        same_class: Number of images that were paired with one of their own class.
    """

    def __init__(self) -> None:
        self._pool: list[Item] = []
        self._waiting: list[Item] = []
        self.same_class = 0

    def add(self, item: Item) -> list[tuple[Item, Item]]:
        """Add the next image; return the pairs (image, other) that it completes."""
        pairs = []
        waiting = next((i for i, old in enumerate(self._waiting) if old.group != item.group), -1)
        if waiting >= 0:
            pairs.append((self._waiting.pop(waiting), item))
        if (other := self._draw(item)) is not None:
            pairs.append((item, other))
        else:
            self._waiting.append(item._replace(samples=None))  # frees its reconstructions
            if len(self._waiting) > MAX_WAITING:
                pairs += self._pair_leftover(self._waiting.pop(0))
        self._add_to_pool(item)
        return pairs

    def finish(self) -> list[tuple[Item, Item]]:
        """Return pairs for all images still held back, unless all show one photograph."""
        waiting, self._waiting = self._waiting, []
        return [pair for item in waiting for pair in self._pair_leftover(item)]

    def _pair_leftover(self, item: Item) -> list[tuple[Item, Item]]:
        """Pair an image that was held back, if need be with a photograph of its own class."""
        other = self._draw(item)
        if other is None:
            other = self._draw(item, by="photograph")
            self.same_class += other is not None
        return [] if other is None else [(item, other)]

    def _draw(self, item: Item, by: str = "group") -> Item | None:
        """Draw an image of another group or photograph from the pool, if there is one."""
        others = [other for other in self._pool if getattr(other, by) != getattr(item, by)]
        return others[_random_index(item, 0, len(others))] if others else None

    def _add_to_pool(self, item: Item) -> None:
        """Add an image; if the pool is full, drop a random one of the largest class."""
        self._pool.append(item)
        if len(self._pool) > POOL:
            sizes = Counter(other.group for other in self._pool)
            largest = max(sizes.values())
            candidates = [i for i, other in enumerate(self._pool) if sizes[other.group] == largest]
            del self._pool[candidates[_random_index(item, 1, len(candidates))]]


def _random_index(item: Item, draw: int, number: int) -> int:
    """Draw an index below `number` from the image's own generator for this kind of draw."""
    generator = make_generator(SEED, Draw.SHUFFLE, item.index, draw)
    return int(torch.randint(number, (), generator=generator))


def other_images(labels: Sequence[int]) -> list[int]:
    """Return for each image the index of the next one of another class, or else of the next one.

    In a folder sorted by class, the next image is mostly of the same class, so closer than chance.

    Args:
        labels: Classes of the images, shape (N,); a negative label is a class of its own.

    Raises:
        InputError: There is only one image.
    """
    number = len(labels)
    if number < 2:
        raise InputError("There is no other image to compare with: expected two or more.")
    others = []
    for i, label in enumerate(labels):
        following = ((i + k) % number for k in range(1, number))
        other_class = (j for j in following if labels[j] < 0 or labels[j] != label)
        others.append(next(other_class, (i + 1) % number))
    return others
