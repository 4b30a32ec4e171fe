"""Key-value cache in 8- or 4-bit integers with a range for each token and head, measured as it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aerogel.methods.kv_cache.policy import KVCachePolicy
from aerogel.runtime.kv_cache.stores import Store, TokenStore


@dataclass(frozen=True)
class KVCacheInt(KVCachePolicy):
    """Stores keys and values as integers, each head of each token between its own least and largest number."""

    bits: Literal[4, 8] = 8
    """Bits of a number; 32 bits of range come with each head of a token."""

    def fits(self, channels: int) -> bool:
        """Return False where channels do not fill bytes."""
        return channels * self.bits % 8 == 0

    def stores(self, scales: Mapping[str, Tensor]) -> tuple[Store, Store]:
        """Return stores of integers."""
        return TokenStore(self.bits), TokenStore(self.bits)
