"""Which other image each image of a stream is compared with."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from featinv.utils.seeding import Draw, make_generator

POOL = 32  # images that later ones are compared with
PATIENCE = 1000  # images that may wait for one of another class; half a gigabyte at full scale
SEED = 0  # fixed: the floor is a property of the set of images


@dataclass(frozen=True)
class Item:
    """An image of the stream: its number in the set, what it shows, and what is compared."""

    index: int
    label: int  # -1: unknown
    photograph: str
    own: Any  # of the image itself
    drawn: Any  # of its reconstructions

    @property
    def group(self) -> int | str:
        """Its class, or the photograph where the class is unknown."""
        return self.label if self.label >= 0 else self.photograph


class Pairing:
    """Finds for each image another one of another class, in one pass and bounded memory.

    Images come in the order of the set, one at a time, so the batch size does not matter. Each is
    paired with one that came before it, drawn at random from a pool of `POOL` images in which the
    classes stay even: a newcomer pushes out a random image of the largest class. Until a second
    class comes along, images wait, and then take the newcomers one by one; so a folder sorted by
    class is fine. Where a class is unknown, any other photograph is of another class, but never
    another crop of the same one.

    If there is one class only, or more than `PATIENCE` images wait, another photograph of the same
    class is taken, and counted.

    Attributes:
        same_class: How many images were paired with one of their own class.
    """

    def __init__(self) -> None:
        self._pool: list[Item] = []
        self._waiting: list[Item] = []
        self.same_class = 0

    def add(self, item: Item) -> list[tuple[Item, Item]]:
        """Take the next image; return those (image, other) that are pairs now."""
        pairs = []
        waited = next((i for i, first in enumerate(self._waiting) if first.group != item.group), -1)
        if waited >= 0:
            pairs.append((self._waiting.pop(waited), item))
        if (other := self._draw(item)) is not None:
            pairs.append((item, other))
        else:
            self._waiting.append(replace(item, drawn=None))  # what the others are compared with
            if len(self._waiting) > PATIENCE:
                pairs += self._give_in(self._waiting.pop(0))
        self._keep(item)
        return pairs

    def finish(self) -> list[tuple[Item, Item]]:
        """Return pairs of all that still wait; none for images of one photograph."""
        waiting, self._waiting = self._waiting, []
        return [pair for item in waiting for pair in self._give_in(item)]

    def _give_in(self, item: Item) -> list[tuple[Item, Item]]:
        """Pair an image that found no other class, if need be with a photograph of its own."""
        other = self._draw(item)
        if other is None:
            other = self._draw(item, by="photograph")
            self.same_class += other is not None
        return [] if other is None else [(item, other)]

    def _draw(self, item: Item, by: str = "group") -> Item | None:
        """Draw an image from the pool that shows something else, if there is one."""
        others = [other for other in self._pool if getattr(other, by) != getattr(item, by)]
        return others[_random(item, 0, len(others))] if others else None

    def _keep(self, item: Item) -> None:
        """Put an image into the pool; a random one of the largest class leaves a full one."""
        self._pool.append(item)
        if len(self._pool) > POOL:
            sizes = Counter(other.group for other in self._pool)
            largest = max(sizes.values())
            crowd = [i for i, other in enumerate(self._pool) if sizes[other.group] == largest]
            del self._pool[crowd[_random(item, 1, len(crowd))]]


def _random(item: Item, draw: int, number: int) -> int:
    """Draw a number below `number` by the image's own generator, one for each kind of draw."""
    generator = make_generator(SEED, Draw.SHUFFLE, item.index, draw)
    return int(torch.randint(number, (), generator=generator))
