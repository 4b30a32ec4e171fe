"""Blocks of a driven denoiser whose activations are not kept for the backward pass but computed again there, block by block.

The slots in a block are not only read there: what they keep changes with each forward. So a block is computed again with its slots as they
were when it ran, and afterwards they are as they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aerogel.model.hooks import patch_forward
from aerogel.runtime.feature_cache.driven import Driven
from aerogel.runtime.feature_cache.schedule import Slot


@contextmanager
def recomputing(denoiser: Driven) -> Iterator[None]:
    """Keep only what goes into each block for the backward pass, for a while; gradients stay the same."""
    answers: dict[nn.Module, Callable[..., Any]] = {}
    for name, block in denoiser.network.blocks().items():
        inside = [slot for unit, slot in denoiser.slots.items() if f"{unit}.".startswith(f"{name}.")]
        answers[block] = partial(_run, block.forward, inside)
    with patch_forward(answers):
        yield


def _run(own: Callable[..., Any], slots: Sequence[Slot], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    then = [dict(vars(slot)) for slot in slots]
    return checkpoint(own, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_then(slots, then)), **kwargs)


@contextmanager
def _as_then(slots: Sequence[Slot], then: Sequence[dict[str, Any]]) -> Iterator[None]:
    """The slots with what they had, for a while."""
    now = [dict(vars(slot)) for slot in slots]
    try:
        for slot, had in zip(slots, then, strict=True):
            vars(slot).update(had)
        yield
    finally:
        for slot, had in zip(slots, now, strict=True):
            vars(slot).update(had)
