"""KIVI: keys in few bits channel by channel, values token by token, the latest tokens as they are (arXiv:2402.02750)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from aerogel.methods.base import Before
from aerogel.methods.kv_cache.policy import KVCachePolicy
from aerogel.model.network import Network
from aerogel.runtime.kv_cache.stores import ChannelStore, RecentStore, Store, TokenStore


@dataclass(frozen=True)
class Kivi(KVCachePolicy):
    """Stores keys with a range for each channel of a group of tokens, where their outliers are, and values with ranges along channels.

    The latest `residual` tokens stay in 16 bits, and the prompt attends to itself unquantized.
    """

    exact_prompt: ClassVar[bool] = True

    bits: Literal[2, 4] = 4
    """Bits of a number."""
    group: Annotated[int, Field(ge=1, le=1024)] = 32
    """Tokens of a key's channel, and channels of a value, that share a range of 32 bits."""
    residual: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Latest tokens in 16 bits; a multiple of the group. As many keys are quantized at once, of values the oldest one by one."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare residual and group."""
        if self.residual % self.group:
            yield f"residual is {self.residual}, expected a multiple of the group, which is {self.group}"

    def fits(self, channels: int) -> bool:
        """Return False where groups do not divide the channels, or these do not fill bytes."""
        return channels % min(self.group, channels) == 0 and channels * self.bits % 8 == 0

    def stores(self, scales: Mapping[str, Tensor]) -> tuple[Store, Store]:
        """Return stores whose latest tokens are not quantized."""
        keys = RecentStore(ChannelStore(self.bits, self.group), partial(_whole, self.residual))
        return keys, RecentStore(TokenStore(self.bits, self.group), partial(_beyond, self.residual))


def _whole(residual: int, recent: int) -> int:
    """Keys leave when there are `residual` of them, all at once."""
    return recent // residual * residual


def _beyond(residual: int, recent: int) -> int:
    """Of the values `residual` stay."""
    return max(0, recent - residual)
