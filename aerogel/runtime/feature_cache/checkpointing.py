"""Blocks of a controlled denoiser whose activations are not kept for the backward pass but computed again there, block by block.

The cache entries in a block change with each forward. So a block is computed again with its entries as they were when it ran,
and afterwards they are as they were found.
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
from aerogel.runtime.feature_cache.controlled import ControlledDenoiser
from aerogel.runtime.feature_cache.schedule import CacheEntry


@contextmanager
def checkpointing_blocks(denoiser: ControlledDenoiser) -> Iterator[None]:
    """Keep only what goes into each block for the backward pass, for a while; gradients stay the same."""
    answers: dict[nn.Module, Callable[..., Any]] = {}
    for name, block in denoiser.network.blocks().items():
        inside = [entry for module, entry in denoiser.entries.items() if f"{module}.".startswith(f"{name}.")]
        answers[block] = partial(_run, block.forward, inside)
    with patch_forward(answers):
        yield


def _run(own: Callable[..., Any], entries: Sequence[CacheEntry], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    then = [dict(vars(entry)) for entry in entries]
    return checkpoint(own, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_then(entries, then)), **kwargs)


@contextmanager
def _as_then(entries: Sequence[CacheEntry], then: Sequence[dict[str, Any]]) -> Iterator[None]:
    """The cache entries with what they had, for a while."""
    now = [dict(vars(entry)) for entry in entries]
    try:
        for entry, had in zip(entries, then, strict=True):
            vars(entry).update(had)
        yield
    finally:
        for entry, had in zip(entries, now, strict=True):
            vars(entry).update(had)
