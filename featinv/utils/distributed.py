"""Ranks: divide work among the processes of a run, and give each the whole result."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, (0, 1) for a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, by rank; their sizes may differ, but not their `ndim`."""
    return [tensor] if rank_and_world()[1] == 1 else gather_all_tensors(tensor)


def gather_objects(value: object) -> list:
    """Return a (small) Python object of each rank, by rank."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def share_rows(compute: Callable[[Sequence[int]], Tensor], num_rows: int) -> Tensor:
    """Compute each row of a tensor on one rank, and return all rows on every rank.

    Args:
        compute: Takes row numbers and returns these rows, shape (len(numbers), ...); a row must not
            depend on the others.
        num_rows: Number of rows, at least 1; the same on every rank.

    Returns:
        Shape (num_rows, ...).
    """
    rank, world = rank_and_world()
    # With fewer rows than ranks, a rank without one computes the first row and discards it.
    rows = compute(range(rank, num_rows, world) or [0])
    parts = gather(rows)
    whole = torch.empty(num_rows, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    for other, part in enumerate(parts):
        whole[other::world] = part[: len(range(other, num_rows, world))]
    return whole
