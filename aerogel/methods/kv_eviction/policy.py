"""Bases of policies by which later tokens read less of what the key-value cache has seen, and what they cost.

B rows, T tokens of a row, V vocabulary, H heads of keys, R tokens that ask, S positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.prompt_selection import max_pool, mean_pool
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.predictions import divergence, predicted
from aerogel.runtime.token_types import Vocabulary
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.eviction import Eviction
from aerogel.runtime.tokens.scores import QueryKey
from aerogel.runtime.tokens.shortening import Shortening

_SPLIT = {"input_ids", "attention_mask", "labels", "use_cache"}
"""Arguments of calls that are read in two forwards."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EvictionState(PolicyState):
    """The decoder that a rule fits, and what the rule costs on the calibration data."""

    blocks: int
    """Decoder blocks."""
    kl: float | None = None
    """KL divergence from the model with its whole cache, in nats a token, over the second halves of rows of text.

    None where rows are padded or hold images.
    """
    tokens: int = 0
    """Tokens that it was measured on."""


@dataclass(frozen=True)
class SelectivePolicy(RuntimePolicy[EvictionState]):
    """Lets tokens behind a prompt attend to some of its positions only."""

    state: ClassVar[type[PolicyState]] = EvictionState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "kv_cache", "decoder"})

    @abstractmethod
    def acting(self, network: Network) -> AbstractContextManager[Any]:
        """Let the rule act for a while."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Number of positions up to which all are read; 0 for a share."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Once with the whole cache and once with what the rule leaves of it."""
        return CostEstimate(model_tokens=2.0 * size.tokens)

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Look for a row of whose first half the second does not read everything."""
        longest = max((call.kwargs["input_ids"].shape[1] for call in calls if "input_ids" in call.kwargs), default=0)
        if longest // 2 <= self.held:
            yield (
                f"the longest row of the calibration data has {longest} tokens, and all of its first half is read; give longer ones "
                f"(--length {4 * self.held}), or keep fewer"
            )

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> EvictionState:
        """Measure what the rule costs where the second half of a row reads the first from the cache."""
        decoder, vocabulary = decoder_of(network), Vocabulary.of(network)
        total, tokens = 0.0, 0
        for call in filter(_is_text, calls):
            at_BT = predicted(call, vocabulary)
            at_BT[:, : (at_BT.shape[1] + 1) // 2] = False
            whole_NV = _second_half(network, call)[at_BT].float()
            with self.acting(network):
                total += divergence(whole_NV, _second_half(network, call)[at_BT].float())
            tokens += len(whole_NV)
        return EvictionState(blocks=decoder.depth, kl=total / tokens if tokens else None, tokens=tokens)

    @contextmanager
    def on(self, network: Network, state: EvictionState) -> Iterator[None]:
        """Let the rule act; raises AerogelError when the state is of a decoder with another number of blocks."""
        if (depth := decoder_of(network).depth) != state.blocks:
            raise AerogelError(
                f"{name_of(self)} was calibrated for a decoder of {state.blocks} blocks, and this model's has {depth}: "
                "calibrate the policy again"
            )
        with self.acting(network):
            yield


@dataclass(frozen=True)
class EvictionPolicy(SelectivePolicy):
    """Lets layers of a key-value cache hold fewer positions than they have seen."""

    @abstractmethod
    def eviction(self) -> Eviction:
        """Return the rule."""

    def acting(self, network: Network) -> AbstractContextManager[Any]:
        """Evict by the rule for a while."""
        return Shortening(network, decoder_of(network), {}, evict=self.eviction()).on()


def _is_text(call: Call) -> bool:
    """Return True for rows of token ids without padding, which can be read in two forwards."""
    mask_BT = call.kwargs.get("attention_mask")
    return not call.args and set(call.kwargs) <= _SPLIT and "input_ids" in call.kwargs and (mask_BT is None or bool(mask_BT.all()))


def _second_half(network: Network, call: Call) -> Tensor:
    """Logits (B, T, V) of rows whose second half reads the first from the cache; NaN for the first half."""
    first_BT, second_BT = call.kwargs["input_ids"].tensor_split(2, dim=1)
    filled = network.run(Call((), {"input_ids": first_BT, "use_cache": True}))
    rest = network.run(Call((), {"input_ids": second_BT, "use_cache": True, "past_key_values": filled.past_key_values}))
    return torch.nn.functional.pad(rest.logits, (0, 0, first_BT.shape[1], 0), value=torch.nan)


def window_scores(seen: QueryKey, real_BS: Tensor, heads: int, *, window: int, kernel: int, pool: str) -> Tensor:
    """Return the attention of the last tokens to each position (B, H, S), a sum over them, pooled; infinite for themselves."""
    number_S = torch.arange(real_BS.shape[1], device=real_BS.device)
    last_B1 = (number_S * real_BS).argmax(1, keepdim=True)
    asking_BR = (last_B1 - number_S[:window].flip(0)).clamp(min=0)
    is_window_BS = (number_S > last_B1 - window) & (number_S <= last_B1)
    received_BHS = seen.attention(asking_BR).sum(2).unflatten(1, (heads, -1)).mean(2)
    received_BHS = received_BHS.masked_fill((is_window_BS | ~real_BS)[:, None], 0)
    return (max_pool if pool == "max" else mean_pool)(received_BHS, kernel).masked_fill(is_window_BS[:, None], torch.inf)
