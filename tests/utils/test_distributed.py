"""Ranks share work, and each gets the whole result."""

import json
from pathlib import Path

import torch

from featinv.utils.distributed import gather, gather_objects, rank_and_world, share_rows


def test_a_single_process_does_everything():
    assert rank_and_world() == (0, 1)
    rows = torch.randn(5, 2)
    assert torch.equal(share_rows(lambda numbers: rows[numbers], 5), rows)
    assert gather(rows)[0] is rows and gather_objects("a") == ["a"]


def shares(rank: int, folder: str) -> None:
    """The work of one of three processes."""
    store = torch.distributed.FileStore(f"{folder}/store", 3)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    asked = []

    def compute(numbers) -> torch.Tensor:
        asked.append(list(numbers))
        return torch.tensor([[n, 10 * n] for n in numbers], dtype=torch.uint8)

    results = [share_rows(compute, number).tolist() for number in (1, 2, 7)]
    parts = [part.tolist() for part in gather(torch.arange(rank))]
    objects = gather_objects({"rank": rank})
    Path(folder, str(rank)).write_text(json.dumps([asked, results, parts, objects]))
    torch.distributed.destroy_process_group()


def test_any_number_of_rows_is_shared(tmp_path):
    torch.multiprocessing.start_processes(shares, (str(tmp_path),), nprocs=3, start_method="fork")
    for rank in range(3):
        asked, results, parts, objects = json.loads((tmp_path / str(rank)).read_text())
        assert results == [[[n, 10 * n] for n in range(number)] for number in (1, 2, 7)]
        assert asked[2] == list(range(rank, 7, 3))  # each does only its own
        assert parts == [[], [0], [0, 1]]
        assert objects == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
