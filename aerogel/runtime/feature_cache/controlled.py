"""A denoiser whose modules are decided from outside, forward by forward: nothing is remembered in between, so any moment can be forked.

What a module gave at earlier steps is handed in and handed back. Kept tensors are never changed, so a fork costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.model.calls import Call, map_tensors
from aerogel.model.hooks import patch_forward, uncompiled
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.schedule import CacheEntry, make_entries

CacheContents = tuple[Any, ...]
"""Last output of each module, None where it has not run yet."""
Row = Sequence[bool] | Tensor
"""Modules that run; or scores (N), by which a module's output is score x new + (1 - score) x kept: both are there, nothing is saved."""


class _Blend(CacheEntry):
    """A cache entry that can also mix what it computes with what it kept."""

    def __init__(self, own: Callable[..., Any]) -> None:
        super().__init__(own)
        self.score: Tensor | None = None
        self.refreshes = True

    def keep(self, made: Any) -> Any:
        """As ever; what is kept has no past that gradients could go back to."""
        return _detached(made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, mixed or not."""
        before, score = self.value, self.score
        if score is None or before is None:
            return super().__call__(*args, **kwargs)
        made = pytree.tree_map(lambda new, old: score * new + (1 - score) * old, self.own(*args, **kwargs), before)
        self.value = _detached(made) if self.refreshes else before
        return made


class ControlledDenoiser:
    """Runs a denoiser with decisions and cache entries that are given by hand."""

    def __init__(self, network: Network, entries: dict[str, _Blend]) -> None:
        self.network = network
        self.entries = entries

    @property
    def empty(self) -> CacheContents:
        """Return the empty cache before the first step."""
        return (None,) * len(self.entries)

    def plain(self, call: Call) -> Any:
        """A forward in which every module runs; of what is kept it knows nothing."""
        made, _ = self.step(call, [True] * len(self.entries), self.empty)
        return made

    def wanted(self, call: Call) -> Any:
        """Return the target: the output of the model before any step of the run; where it has no teacher, that of the plain forward."""
        teacher = self.network.teacher
        return self.plain(call) if teacher is None else teacher.run(call)

    def step(self, call: Call, row: Row, held: CacheContents, threshold: float = 0.0) -> tuple[Any, CacheContents]:
        """A forward by a row; scores above the threshold refresh what is kept. Returns the output and what is kept then."""
        for place, (entry, kept) in enumerate(zip(self.entries.values(), held, strict=True)):
            scored = isinstance(row, Tensor)
            entry.score = row[place] if isinstance(row, Tensor) else None
            entry.computes = scored or kept is None or bool(row[place])
            entry.refreshes = bool(row[place] > threshold)
            entry.keeps, entry.value = True, kept
        made = self.network.module(*call.args, **call.kwargs)
        after = tuple(entry.value for entry in self.entries.values())
        for entry in self.entries.values():
            entry.value = entry.score = None
        return made, after


@contextmanager
def controlled(network: Network) -> Iterator[ControlledDenoiser]:
    """Take over the modules of a denoiser for a while; its weights get no gradients meanwhile."""
    entries, answers = make_entries(network, _Blend)
    with ExitStack() as stack:
        for parameter in network.module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        stack.enter_context(uncompiled(network.module))  # gradients and blends are not for kernels made for use
        stack.enter_context(patch_forward(answers))
        yield ControlledDenoiser(network, entries)


def _detached(tree: Any) -> Any:
    return map_tensors(torch.Tensor.detach, tree)
