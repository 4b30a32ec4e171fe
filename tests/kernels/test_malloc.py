"""The heap: what is freed inside `limit_fragmentation` leaves the process at once, and by glibc's own rule again afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from aerogel.kernels.malloc import limit_fragmentation

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def left():
    "MiB of the freed half of ten tensors that stay with the process while the other half lives."
    before = resident()
    tensors = [torch.ones(2 * 2**20) for _ in range(10)]
    kept = tensors[1::2]
    del tensors
    return resident() - before - 40

with limit_fragmentation() if "limited" in sys.argv else nullcontext():
    large = torch.ones(6 * 2**20)  # once it is freed, glibc keeps tensors of up to its size
    del large
    inside = left()
print(inside, left())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_freed_inside_leaves_at_once_and_stays_afterwards_as_before() -> None:
    (plain, _), (inside, after) = (_left(mode) for mode in ("plain", "limited"))
    assert inside < 4 < 20 < min(plain, after)


def _left(mode: str) -> list[float]:
    answer = subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True)
    return [float(figure) for figure in answer.stdout.split()]
