"""The time on a device: what was given to it is done by then."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that the clock shows once the device has done all it was given; CPUs never lag behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
