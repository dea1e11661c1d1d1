"""A resumed run continues with the next unseen sample, whatever has changed since."""

import time
from collections import deque
from itertools import islice

import pytest
import torch

from data.conftest import (
    Training,
    images_of,
    indices_of,
    keys_of,
    make_shards,
    set_trainer,
    write_shard,
)
from data.test_pictures import folder_of
from featinv.data import FolderDataModule, ShardsDataModule, shard_streams
from featinv.data.shard_streams import Position, TrainShards
from featinv.utils.errors import InputError

CHANGES = [  # batch size, accumulation and ranks, before and after
    ((2, 1, 2), (2, 3, 1)),
    ((3, 2, 1), (1, 1, 4)),
]


def shards_of(root, **options):
    defaults = {"image_size": 8, "batch_size": 3, "seed": 1, "shuffle_buffer": 4}
    return ShardsDataModule(train_shards="train-*.tar", root=root, **defaults | options)


def all_ranks(make, steps: int, batch_size: int, accumulate: int, world: int, state=None):
    """Train on all ranks; return the batches as the optimiser sees them, and the states."""
    ranks = [
        Training(make(batch_size), steps, rank, world, accumulate, state) for rank in range(world)
    ]
    batches = [batch for step in zip(*[r.batches for r in ranks], strict=True) for batch in step]
    states = [dict(state) for state in ranks[0].states]
    for number, state in enumerate(states):  # what the ranks would have gathered
        if "positions" in state:
            state["positions"] = [rank.states[number]["positions"][0] for rank in ranks]
    return batches, states


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_pictures_resume_with_any_batch_size_and_number_of_ranks(tmp_path, before, after):
    folder_of(tmp_path, "abc", per_class=3)
    make = lambda size: FolderDataModule(tmp_path, image_size=8, batch_size=size)  # noqa: E731
    (whole,) = Training(make(48), 1).batches
    start, states = all_ranks(make, 3, *before)
    rest, _ = all_ranks(make, 3, *after, state=states[-1])
    seen = indices_of(start + rest)
    assert seen == list(range(len(seen))) and len(seen) > len(indices_of(start))
    assert torch.equal(images_of(start + rest), whole["image"][: len(seen)])


@pytest.mark.parametrize(("workers", "world"), [(0, 2), (2, 1)])
def test_shards_resume_bit_for_bit_at_every_position(tmp_path, workers, world):
    make_shards(tmp_path, "train", [9, 7, 8, 6])
    write_shard(tmp_path / "train-broken.tar", {"empty": b"", "fine": b""})
    make = lambda size: shards_of(tmp_path, num_workers=workers, batch_size=size)  # noqa: E731
    whole, states = all_ranks(make, 6, 3, 1, world)
    for step in (1, 2, 5):
        rest, later = all_ranks(make, 6 - step, 3, 1, world, states[step])
        assert keys_of(rest) == keys_of(whole[step * world :])
        assert indices_of(rest) == indices_of(whole[step * world :])
        assert torch.equal(images_of(rest), images_of(whole[step * world :]))
        assert later == states[step:]


def test_shards_resume_with_another_batch_size_and_accumulation(tmp_path):
    keys = make_shards(tmp_path, "train", [9, 7, 8, 6])
    make = lambda size: shards_of(tmp_path, num_workers=2, batch_size=size)  # noqa: E731
    whole, _ = all_ranks(make, 10, 3, 1, 1)
    start, states = all_ranks(make, 3, 3, 1, 1)
    rest, _ = all_ranks(make, 3, 2, 2, 1, states[-1])
    by_index = dict(zip(indices_of(whole), keys_of(whole), strict=True))
    seen = dict(zip(indices_of(start + rest), keys_of(start + rest), strict=True))
    assert seen.items() <= by_index.items() and len(seen) == 9 + 12
    for worker in (0, 1):  # each without a gap
        indices = sorted(index for index in seen if index % 2 == worker)
        assert indices == list(range(worker, 2 * len(indices), 2))
    assert len(set(seen.values())) == 21 and set(seen.values()) < set(keys)


def test_options_that_would_change_the_stream_are_errors(tmp_path):
    make_shards(tmp_path, "train", [3, 3, 3, 3])
    state = Training(shards_of(tmp_path), 1).states[-1]
    for options, world, found in (
        ({}, 2, "ranks 2 instead of 1"),
        ({"num_workers": 1, "shuffle_buffer": 5}, 1, "shuffle_buffer 5 instead of 4"),
    ):
        with pytest.raises(InputError, match=f"with {found}: expected the same ranks, workers, sh"):
            Training(shards_of(tmp_path, **options), 1, world=world, state=state)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_checkpoint_without_a_state_resumes_by_its_steps(tmp_path, caplog, kind):
    if kind == "folder":
        module = FolderDataModule(folder_of(tmp_path, "ab"), image_size=8, batch_size=3)
    else:
        make_shards(tmp_path, "train", [9, 9])
        module = shards_of(tmp_path, num_workers=2)
    set_trainer(module, accumulate=2).global_step = 5
    batches = iter(module.train_dataloader())
    assert sorted(indices_of([next(batches), next(batches)])) == list(range(30, 36))
    assert module.state_dict()["samples"] == 5 * 2 * 3
    assert ("training goes on with a new pass" in caplog.text) == (kind == "shards")


def test_resuming_after_two_million_samples_reads_one_shard_again(tmp_path, monkeypatch):
    """A thousand shards of a thousand records, shared by four ranks."""
    opened = []

    def read(url):
        opened.append(url)
        return ({"__key__": f"{url}/{i}"} for i in range(1000))

    def decode(record, view, index):
        return {"image": torch.zeros(1), "index": index, "label": 0, "key": record["__key__"]}

    monkeypatch.setattr(shard_streams, "read_shard", read)
    monkeypatch.setattr(shard_streams, "decode_record", decode)
    for number in range(1000):
        (tmp_path / f"train-{number:04d}.tar").touch()
    module = shards_of(tmp_path, shuffle_buffer=300)
    state = Training(module, 0, rank=2, world=4).states[0]
    stream = TrainShards(module.train_shards, module.train_view, module.seed, 300, pairs=4)
    given = 503_210  # to each rank
    uninterrupted = stream.records(Position(2, 0, 0, 0, 0, 0))
    (place, _) = deque(islice(uninterrupted, given), maxlen=1).pop()
    assert len(opened) > 500
    opened.clear()

    state |= {"samples": 4 * given, "positions": [[], [], [[2, given, *place]], []]}
    start = time.monotonic()
    resumed = Training(shards_of(tmp_path, shuffle_buffer=300), 3, rank=2, world=4, state=state)
    assert time.monotonic() - start < 60
    assert len(opened) == 1
    assert keys_of(resumed.batches) == [record["__key__"] for _, record in islice(uninterrupted, 9)]
    assert indices_of(resumed.batches) == [4 * (given + i) + 2 for i in range(9)]
