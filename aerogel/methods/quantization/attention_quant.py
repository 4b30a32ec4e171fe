"""Quantized operands of attention: queries, keys, values and the probabilities, as Q-Diffusion quantizes them (arXiv:2302.04304).

On CPUs both products are computed by integers where that is faster, elsewhere in float32 on rounded operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
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
from aerogel.runtime.attention import Attend, attending, attentions

KEPT = (*OPERANDS, "query_zero_point", "key_zero_point", "value_zero_point")
"""What the state holds for each attention."""


@dataclass(frozen=True)
class AttentionQuant(RuntimePolicy[dict[str, Any]]):
    """Rounds the operands of every attention to static grids, one for the whole tensor."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "attention"})

    bits: int = 8
    """Bits of queries, keys and values, 2 to 8; their grids have a zero point and the least error in the 2.4-norm."""
    probability_bits: int = 8
    """Bits of the probabilities, 2 to 16; their grid begins at zero and ends at the largest one seen."""
    ignore: tuple[str, ...] = ()
    """Which attentions to leave alone: globs on full dotted names, `re:` patterns or class names."""
    searched: int = 262144
    """Numbers of an operand that the search for its grid looks at, drawn at random, as many from every call."""

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 and 2 <= self.probability_bits <= 16):
            raise AerogelError(
                f"attention_quant: bits {self.bits} and probability_bits {self.probability_bits}; expected 2 to 8 and 2 to 16"
            )

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Look at the operands of all calls; raises AerogelError when the network's attention cannot be found."""
        named = attentions(network, calls[0])
        ignore = network.family.expand_patterns(self.ignore)
        names = [name for name in named if not matches(name, ignore, network.module.get_submodule(name))]
        if not names:
            raise AerogelError(
                f"{len(named)} modules of this network call scaled_dot_product_attention and {len(named)} are ignored; "
                "expected at least one to be left: use torch's attention (attn_implementation='sdpa'), or leave operands out"
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
        state: dict[str, Any] = {"attentions": names}
        for name, most in largest.items():
            state[f"{name}.probabilities"] = most / (2**self.probability_bits - 1)
        for (name, operand), search in searches.items():
            grid = search.grid()
            assert grid.zero is not None, "the scheme is asymmetric"
            state |= {f"{name}.{operand}": grid.scale, f"{name}.{operand}_zero_point": grid.zero}
        return state

    def step_sizes(self, state: Mapping[str, Any], block: str) -> tuple[str, ...]:
        """Those of the attentions in the block."""
        inside = [name for name in state["attentions"] if name == block or name.startswith(f"{block}.")]
        return tuple(f"{name}.{operand}" for name in inside for operand in OPERANDS)

    @contextmanager
    def on(self, network: Network, state: dict[str, Any]) -> Iterator[None]:
        """Round operands while attentions run, with straight-through gradients."""
        with attending(network, state["attentions"], partial(self._attend, state)):
            yield

    def _attend(self, state: Mapping[str, Any], name: str) -> Attend:
        def answer(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            here = {key: state[f"{name}.{key}"].to(query.device) for key in KEPT}
            grids = {operand: Grid(here[operand], here[f"{operand}_zero_point"]) for operand in ("query", "key", "value")}
            operands = kernel.Operands(grids, self.bits, here["probabilities"], 2**self.probability_bits - 1)
            return kernel.run(query, *args, operands=operands, **kwargs)

        return answer
