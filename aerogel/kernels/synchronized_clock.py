"""The time on a device: the host's clock, read once the device has finished what was queued on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

host_clock: Callable[[], float] = time.perf_counter
"""Seconds on the host. All measurements of a duration read this one, so that a test can replace it."""


def now(device: torch.device, clock: Callable[[], float] | None = None) -> float:
    """Return the seconds on `clock`, else on the host's, once the device has finished all queued work; a CPU has nothing queued."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return (clock or host_clock)()
