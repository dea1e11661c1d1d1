"""Precision: bfloat16 where this machine computes faster with it, float32 elsewhere."""

import logging
import time
from functools import cache

import torch
import torch.nn.functional as F

from featinv.utils.errors import unknown

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "32-true", "bf16-mixed")
FAR_SLOWER = 2.0  # slowdown above which an explicit choice gets a warning


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision to compute in.

    bfloat16 halves the time of a convolution on processors with instructions for it, and takes up
    to 34 times as long on those that emulate it, so `"auto"` measures.

    Args:
        precision: `"32-true"` or `"bf16-mixed"`, with a warning if the choice is far slower than
            the other; or `"auto"`, the faster one.
        device: Where to compute.

    Returns:
        `"32-true"` or `"bf16-mixed"`.

    Raises:
        InputError: Unknown precision.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        if precision != "auto":
            return precision
        log.info("precision=bf16-mixed: this GPU has bfloat16")
        return "bf16-mixed"
    if precision == "32-true":  # fine on every machine
        return precision
    seconds = convolution_seconds(device)
    faster = min(seconds, key=seconds.get)
    timings = ", ".join(f"{1000 * value:.1f} ms in {name}" for name, value in seconds.items())
    if precision == "auto":
        log.info("precision=%s: a convolution takes %s on this %s", faster, timings, device.type)
        return faster
    if seconds[precision] > FAR_SLOWER * seconds[faster]:
        log.warning(
            "precision=%s is slow on this %s, where a convolution takes %s; precision=auto would "
            "take %s",
            *(precision, device.type, timings, faster),
        )
    return precision


@cache
def convolution_seconds(device: torch.device) -> dict[str, float]:
    """Time a small convolution, forward and backward: precision -> seconds, best of three runs."""
    images = torch.randn(4, 64, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.full((64, 64, 3, 3), 0.01, device=device, requires_grad=True)

    def run(half: bool) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half), torch.enable_grad():
            loss = F.conv2d(images, weight, padding=1).float().square().mean()
        torch.autograd.grad(loss, weight)[0].sum().item()  # waits for the device
        return time.perf_counter() - start

    # The first run of each warms up.
    return {
        name: min([run(half) for _ in range(4)][1:])
        for name, half in (("32-true", False), ("bf16-mixed", True))
    }
