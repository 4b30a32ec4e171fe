"""The choice between implementations of one operation: each is timed at the first call of its kind, and the fastest is kept.

Which one wins depends on the processor, the threads, the shapes and the dtypes; nothing here assumes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from aerogel.kernels.synchronized_clock import now

Implementations = Mapping[str, Callable[[], object]]
"""Calls that compute the same, by name; the reference is the last."""
_TRIALS = 3

_choices: dict[Hashable, str] = {}


def fastest(key: Hashable, implementations: Callable[[], Implementations], device: torch.device) -> str:
    """Return the name of the fastest implementation, measured at the first use of `key` and kept for the life of the process.

    `implementations` is called only when there is something to measure.
    """
    if key not in _choices:
        made = implementations()
        seconds = {name: timed(run, device) for name, run in made.items()} if len(made) > 1 else dict.fromkeys(made, 0.0)
        _choices[key] = min(seconds, key=seconds.__getitem__)
    return _choices[key]


def forget() -> None:
    """Drop all choices, so that the next calls measure again."""
    _choices.clear()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few runs in seconds; the first does not count: it packs weights and fills caches."""
    taken = []
    for _ in range(_TRIALS + 1):
        start = now(device)
        run()
        taken.append(now(device) - start)
    return min(taken[1:])
