"""Devices: pick one by name, wait for it, and keep freed CPU memory mapped."""

import ctypes
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

import torch
from torch import nn

from featinv.utils.errors import InputError


def pick_device(name: str) -> torch.device:
    """Return a device by its name; `"auto"` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise InputError(
            f"The device '{name}' cannot be used on this machine: expected auto or "
            f"{', '.join(['cpu', *gpus])}."
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work, to time it."""
    if device.type != "cpu":  # a CPU computes at once
        torch.accelerator.synchronize(device)


@contextmanager
def timed(device: torch.device) -> Iterator[SimpleNamespace]:
    """Time a block with all of its work on a device.

    Yields:
        An object that has `seconds` and `cpu_seconds` once the block has ended.
    """
    synchronize(device)  # exclude pending work from the timing
    start, cpu_start = time.perf_counter(), time.process_time()
    spent = SimpleNamespace()
    yield spent
    synchronize(device)
    spent.seconds = time.perf_counter() - start
    spent.cpu_seconds = time.process_time() - cpu_start


def keep_freed_memory() -> None:
    """On glibc, keep freed memory mapped.

    By default glibc returns each large tensor to the system, which hands it out again page by page:
    on some CPUs these page faults take a third of the time. In the environment of a program that
    does not call this, `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` does the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's weights; the CPU, if there are none."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
