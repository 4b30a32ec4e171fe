"""Offloading: keys and values wait in host memory for the block that attends to them.

Nothing is predicted: every token needs the layers of the cache one after the other, so the next one is fetched while a block computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from aerogel.errors import AerogelError
from aerogel.methods.base import Before, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.options import CountOrZero
from aerogel.runtime.kv_cache.offloading import Offloading
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.tokens.decoder import decoder_of


@dataclass(frozen=True, eq=False, kw_only=True)
class OffloadState(PolicyState):
    """The decoder that the policy fits."""

    blocks: int
    """Decoder blocks."""


@dataclass(frozen=True)
class KvOffload(RuntimePolicy[OffloadState]):
    """Keeps keys and values in host memory, and on the device those of two decoder blocks: the one that attends and the next."""

    state: ClassVar[type[PolicyState]] = OffloadState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"kv_cache", "decoder"})
    exact_prompt: ClassVar[bool] = True
    """Nothing that is computed changes."""

    resident: CountOrZero = 0
    """First decoder blocks whose keys and values stay on the device."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the blocks that stay with the depth of the decoder."""
        if self.resident >= (depth := decoder_of(network).depth):
            yield f"resident is {self.resident}, and the decoder has {depth} blocks: nothing would be offloaded"

    def calibrate(self, network: Network, calls: Sequence[Call]) -> OffloadState:
        """Note the depth of the decoder."""
        return OffloadState(blocks=decoder_of(network).depth)

    @contextmanager
    def on(self, network: Network, state: OffloadState) -> Iterator[None]:
        """Offload; raises AerogelError when the state is of a decoder with another number of blocks."""
        decoder = decoder_of(network)
        if decoder.depth != state.blocks:
            raise AerogelError(
                f"{name_of(self)} was calibrated for a decoder of {state.blocks} blocks, and this model's has {decoder.depth}: "
                "calibrate the policy again"
            )
        with Offloading(network, decoder, self.resident).on():
            yield
