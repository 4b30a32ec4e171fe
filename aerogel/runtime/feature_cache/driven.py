"""A denoiser whose units are decided from outside, forward by forward: nothing is remembered in between, so any moment can be forked.

What a unit gave at earlier steps is handed in and handed back. Kept tensors are never changed, so a fork costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.model.calls import Call, map_tensors
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.compiled import uncompiled
from aerogel.runtime.feature_cache.schedule import Slot, stand_ins

Held = tuple[Any, ...]
"""What each unit gave last, None where it has not run yet."""
Row = Sequence[bool] | Tensor
"""Which units run; or scores (N), by which a unit's output is score x new + (1 - score) x kept: both are there, nothing is saved."""


class _Blend(Slot):
    """A slot that can also mix what it computes with what it kept."""

    def __init__(self, own: Callable[..., Any]) -> None:
        super().__init__(own)
        self.score: Tensor | None = None
        self.refreshes = True

    def keep(self, made: Any) -> Any:
        """As ever; what is kept has no past that gradients could go back to."""
        return _detached(made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the unit gives, mixed or not."""
        before, score = self.value, self.score
        if score is None or before is None:
            return super().__call__(*args, **kwargs)
        made = pytree.tree_map(lambda new, old: score * new + (1 - score) * old, self.own(*args, **kwargs), before)
        self.value = _detached(made) if self.refreshes else before
        return made


class Driven:
    """Runs a denoiser with decisions and slots that are given by hand."""

    def __init__(self, network: Network, slots: dict[str, _Blend]) -> None:
        self.network = network
        self.slots = slots

    @property
    def empty(self) -> Held:
        """What is kept before the first step."""
        return (None,) * len(self.slots)

    def plain(self, call: Call) -> Any:
        """A forward in which every unit runs; of what is kept it knows nothing."""
        made, _ = self.step(call, [True] * len(self.slots), self.empty)
        return made

    def wanted(self, call: Call) -> Any:
        """What to come close to: what the network gave before any step of the run; where it has no teacher, the plain forward."""
        teacher = self.network.teacher
        return self.plain(call) if teacher is None else teacher.run(call)

    def step(self, call: Call, row: Row, held: Held, threshold: float = 0.0) -> tuple[Any, Held]:
        """A forward by a row; scores above the threshold refresh what is kept. Returns the output and what is kept then."""
        for place, (slot, kept) in enumerate(zip(self.slots.values(), held, strict=True)):
            scored = isinstance(row, Tensor)
            slot.score = row[place] if isinstance(row, Tensor) else None
            slot.computes = scored or kept is None or bool(row[place])
            slot.refreshes = bool(row[place] > threshold)
            slot.keeps, slot.value = True, kept
        made = self.network.module(*call.args, **call.kwargs)
        after = tuple(slot.value for slot in self.slots.values())
        for slot in self.slots.values():
            slot.value = slot.score = None
        return made, after


@contextmanager
def driven(network: Network) -> Iterator[Driven]:
    """Take over the units of a denoiser for a while; its weights get no gradients meanwhile."""
    slots, answers = stand_ins(network, _Blend)
    with ExitStack() as stack:
        for parameter in network.module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        stack.enter_context(uncompiled(network.module))  # gradients and blends are not for kernels made for use
        stack.enter_context(patch_forward(answers))
        yield Driven(network, slots)


def _detached(tree: Any) -> Any:
    return map_tensors(torch.Tensor.detach, tree)
