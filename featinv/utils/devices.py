"""Devices: pick one by name, and wait for it."""

import torch

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
    if device.type != "cpu":  # which is always in sync
        torch.accelerator.synchronize(device)
