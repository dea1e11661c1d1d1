import pytest

from featinv.evaluation import pairing
from featinv.evaluation.pairing import Item, Pairing, other_images
from featinv.utils.errors import InputError


def stream(labels: list[int], photographs: list[str] | None = None) -> list[Item]:
    photographs = photographs or [f"p{i}" for i in range(len(labels))]
    return [
        Item(i, label, photograph, own=f"own{i}", samples=f"drawn{i}")
        for i, (label, photograph) in enumerate(zip(labels, photographs, strict=True))
    ]


def partners(items: list[Item], found: Pairing | None = None) -> dict[int, Item]:
    """Pair a whole set: number -> the other image, each just once."""
    found = found or Pairing()
    pairs = [pair for item in items for pair in found.add(item)] + found.finish()
    assert len({item.index for item, _ in pairs}) == len(pairs)
    assert all(other.samples == f"drawn{other.index}" for _, other in pairs)
    return {item.index: other for item, other in pairs}


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_another_image_is_of_another_class(order):
    labels = [i // 100 for i in range(500)] if order == "sorted" else [i % 5 for i in range(500)]
    items = stream(labels)
    found = partners(items)
    assert len(found) == 500
    assert all(found[item.index].label != item.label for item in items)
    # Neither few images for all, nor one class for another (but for the first two when sorted).
    assert len({other.index for other in found.values()}) > 100
    for label in (2, 3, 4):
        assert len({found[i].label for i in range(500) if labels[i] == label}) > 1
    assert found == partners(items)


def test_memory_is_bounded_and_rare_classes_stay_in_it():
    found = Pairing()
    for item in stream([0, 1] + [2] * 300):
        found.add(item)
    assert len(found._pool) == pairing.POOL
    assert {item.label for item in found._pool} == {0, 1, 2}


def test_crops_are_never_compared_with_their_own_photograph():
    photographs = [name for name in ("cat", "cup", "dahlia") for _ in range(8)]
    items = stream([-1] * 24, photographs)
    found = Pairing()
    paired = partners(items, found)
    assert all(paired[item.index].photograph != item.photograph for item in items)
    assert len(paired) == 24 and found.same_class == 0
    assert partners(stream([-1] * 3, ["cat"] * 3)) == {}


def test_pairs_within_a_single_class_are_counted():
    found = Pairing()
    paired = partners(stream([7] * 20), found)
    assert len(paired) == 20 == found.same_class
    assert all(other.index != i for i, other in paired.items())


def test_the_number_of_waiting_images_is_bounded(monkeypatch):
    monkeypatch.setattr(pairing, "MAX_WAITING", 10)
    found = Pairing()
    paired = partners(stream([0] * 30 + [1] * 30), found)
    assert len(paired) == 60 and found.same_class == 20
    assert [paired[i].label for i in range(60)] == [0] * 20 + [1] * 10 + [0] * 30


def test_the_next_image_of_another_class():
    assert other_images([3, 3, 3, 5]) == [3, 3, 3, 0]
    assert other_images([3, 3]) == [1, 0]
    assert other_images([-1, -1, -1]) == [1, 2, 0]
    with pytest.raises(InputError, match="There is no other image"):
        other_images([3])
