"""Quantized operands of attention: queries, keys, values and the probabilities, as Q-Diffusion quantizes them (arXiv:2302.04304).

On CPUs both products are computed by integers where that is faster, elsewhere in float32 on rounded operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.kernels import attention as kernel
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.base import Requirement, RuntimePolicy
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.numerics.attention import OPERANDS, attention
from aerogel.numerics.observers import Searched
from aerogel.numerics.quantize import Grid
from aerogel.options import Count
from aerogel.runtime.attention import Attend, attending, attentions
from aerogel.runtime.policy_state import PolicyState, by_name

_ZERO_POINTS = tuple(f"{operand}_zero_point" for operand in ("query", "key", "value"))


@dataclass(frozen=True, eq=False)
class AttentionQuantState(PolicyState):
    """The grids of all attentions."""

    attentions: tuple[str, ...]
    """Full names."""
    grids: Mapping[str, Tensor] = by_name()
    """Step sizes `attention.query`, `.key`, `.value`, `.probabilities` and zero points `attention.query_zero_point`, ..."""


@dataclass(frozen=True)
class AttentionQuant(RuntimePolicy[AttentionQuantState]):
    """Quantizes the operands of every attention with static ranges, one per tensor."""

    state: ClassVar[type[PolicyState]] = AttentionQuantState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "attention"})

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits of queries, keys and values, 2 to 8; their grids have a zero point and the least error in the 2.4-norm."""
    probability_bits: Annotated[int, Field(ge=2, le=16)] = 8
    """Bits of the probabilities, 2 to 16; their grid begins at zero and ends at the largest one seen."""
    ignore: tuple[str, ...] = ()
    """Attention modules to leave alone: globs on full dotted names, `re:` patterns or class names."""
    searched: Count = 262144
    """Numbers of an operand that the search for its grid looks at, drawn at random, as many from every call."""

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> AttentionQuantState:
        """Look at the operands of all calls; raises AerogelError when the network's attention cannot be found."""
        named = attentions(network, calls[0])
        ignore = network.expand_patterns(self.ignore)
        names = [name for name in named if not matches(name, ignore, network.module.get_submodule(name))]
        if not names:
            raise AerogelError(
                f"{len(named)} modules of this model call scaled_dot_product_attention and {len(named)} are ignored; "
                "expected at least one to be left: use torch's attention (attn_implementation='sdpa'), or leave attention_quant out"
            )
        searches: dict[tuple[str, str], Searched] = defaultdict(
            partial(Searched, kernel.scheme_of(self.bits), max(1, self.searched // len(calls)))
        )
        largest: dict[str, Tensor] = {}

        def see(name: str, operand: str, x: Tensor) -> Tensor:
            if operand == "probabilities":
                largest[name] = torch.maximum(largest.get(name, x.new_zeros(())), x.amax())
            else:
                searches[name, operand].update(x)
            return x

        with attending(network, names, lambda name: partial(attention, change=partial(see, name))), cache_dequantized(network.module):
            for call in calls:
                network.run(call)
        grids = {f"{name}.probabilities": most / (2**self.probability_bits - 1) for name, most in largest.items()}
        for (name, operand), search in searches.items():
            grid = search.grid()
            assert grid.zero is not None, "the scheme is asymmetric"
            grids |= {f"{name}.{operand}": grid.scale, f"{name}.{operand}_zero_point": grid.zero}
        return AttentionQuantState(tuple(names), grids)

    def quantized(self, state: AttentionQuantState) -> tuple[str, ...]:
        """Return the names of the attentions."""
        return state.attentions

    def parameters(self, state: AttentionQuantState) -> dict[str, Tensor]:
        """Return the step sizes of all operands."""
        names = [f"{attention}.{operand}" for attention in state.attentions for operand in OPERANDS]
        return {name: state.grids[name] for name in names}

    def with_parameters(self, state: AttentionQuantState, values: Mapping[str, Tensor]) -> AttentionQuantState:
        """Return the state with other step sizes."""
        return replace(state, grids={**state.grids, **values})

    def on(self, network: Network, state: AttentionQuantState) -> AbstractContextManager[None]:
        """Round operands while attentions run, with straight-through gradients."""
        return self.on_with(network, state, self.parameters(state))

    @contextmanager
    def on_with(self, network: Network, state: AttentionQuantState, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """The same with other step sizes, which may change meanwhile."""
        with attending(network, state.attentions, partial(self.attend, state.grids, parameters)):
            yield

    def attend(self, grids: Mapping[str, Tensor], step_sizes: Mapping[str, Tensor], name: str) -> Attend:
        """Return the attention of the module with this name on rounded operands."""

        def answer(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = {operand: step_sizes[f"{name}.{operand}"].to(query.device) for operand in OPERANDS}
            zero = {key: grids[f"{name}.{key}"].to(query.device) for key in _ZERO_POINTS}
            rounded = {operand: Grid(step[operand], zero[f"{operand}_zero_point"]) for operand in ("query", "key", "value")}
            operands = kernel.Operands(rounded, self.bits, step["probabilities"], 2**self.probability_bits - 1)
            return kernel.run(query, *args, operands=operands, **kwargs)

        return answer
