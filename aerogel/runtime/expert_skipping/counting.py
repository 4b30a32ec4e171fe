"""Counts the token-expert assignments of an MoE model that are kept and dropped, by layer, kind of token and phase.

L layers, K kinds of token, P phases (prefill and decoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.signature import arguments_of
from aerogel.model.network import Network
from aerogel.model.structure.moe import count_of
from aerogel.runtime.expert_skipping.routing import experts_of
from aerogel.runtime.token_types import KINDS, PADDING, Vocabulary

PREFILL, DECODING = 0, 1


@dataclass
class Tally:
    """Counts of token-expert assignments and of tokens."""

    assignments_LKP: Tensor
    kept_LKP: Tensor
    tokens_LKP: Tensor
    dropped_LKP: Tensor
    """Tokens of which all assignments are dropped."""
    kind_BS: Tensor | None = None
    _guard: ForwardGuard = field(default_factory=ForwardGuard)

    @classmethod
    def empty(cls, layers: int, device: torch.device) -> Tally:
        """Nothing counted."""
        zeros = [torch.zeros(layers, len(KINDS), 2, dtype=torch.int64, device=device) for _ in range(4)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3])

    def look(
        self, vocabulary: Vocabulary, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before a forward: tell its tokens apart."""
        self._guard.enter(module)
        self.kind_BS = vocabulary.kinds(dict(zip(names, args, strict=False)) | kwargs)

    def forget(self, *_: Any) -> None:
        """After a forward, also one that failed: what comes next has tokens of its own."""
        if self._guard.leave():
            self.kind_BS = None

    def add(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a layer's experts: count; nothing waits for the device."""
        if self.kind_BS is None:
            raise AerogelError(
                f"the experts of layer {layer} run outside of the model's own forward, so that their tokens cannot be counted"
            )
        kept_T, kind_T = (args[1] < count_of(module)).sum(1), self.kind_BS.reshape(-1)
        phase = DECODING if self.kind_BS.shape[1] == 1 else PREFILL
        one_T = torch.ones_like(kept_T)
        for counts_LKP, numbers_T in (
            (self.assignments_LKP, one_T * args[1].shape[1]),
            (self.kept_LKP, kept_T),
            (self.tokens_LKP, one_T),
            (self.dropped_LKP, (kept_T == 0).long()),
        ):
            counts_LKP[layer, :, phase].index_add_(0, kind_T, numbers_T)

    def ratio(self, phase: int | None = None) -> float:
        """Return the share of dropped assignments, of all but padding; of one phase or of both. NaN where no token passed."""
        phases = slice(None) if phase is None else slice(phase, phase + 1)
        pairs, kept = (int(counts[:, :PADDING, phases].sum()) for counts in (self.assignments_LKP, self.kept_LKP))
        return 1 - kept / pairs if pairs else float("nan")


@contextmanager
def counting(network: Network, vocabulary: Vocabulary) -> Iterator[Tally]:
    """Count while the network runs; enter it after the policy that skips experts. Raises AerogelError when there are no routed experts."""
    found = experts_of(network)
    tally = Tally.empty(len(found), network.device)
    with ExitStack() as stack:
        hook = partial(tally.look, vocabulary, arguments_of(network.module))
        stack.callback(network.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(network.module.register_forward_hook(tally.forget, always_call=True).remove)
        for layer, module in enumerate(found.values()):
            stack.callback(module.register_forward_pre_hook(partial(tally.add, layer)).remove)
        yield tally
