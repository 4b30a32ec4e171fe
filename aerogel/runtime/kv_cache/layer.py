"""A cache layer of transformers that keeps keys and values in stores of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aerogel.errors import AerogelError
from aerogel.runtime.kv_cache.stored_rows import StoredRowsLayer
from aerogel.runtime.kv_cache.stores import Store

MakeStores = Callable[[], tuple[Store, Store]]
"""A function that makes empty stores of keys and of values."""


class QuantizedCacheLayer(StoredRowsLayer):
    """Keys and values of one attention: what is read back is what was stored, by the call that stores it already.

    With `exact_prompt` the first call reads its own keys and values as they came. A sliding window bounds what is read; what lies before
    it stays stored.
    """

    form = "a quantized key-value cache"

    def __init__(self, make: MakeStores, window: int | None = None, exact_prompt: bool = False) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self._make, self._window, self._exact_prompt = make, window, exact_prompt
        self.stored_keys, self.stored_values = make()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D); returns all that are attended to."""
        before = self.get_seq_length()
        self.append(key_states, value_states)
        if self._exact_prompt and not before:
            return key_states, value_states
        first = 0 if self._window is None else max(0, before - self._window + 1)
        return self.stored_keys.read(first), self.stored_values.read(first)

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Store keys and values without reading anything."""
        self.lazy_initialization(keys_BHTD, values_BHTD)
        self.stored_keys.append(keys_BHTD)
        self.stored_values.append(values_BHTD)

    def attend(self, query_BHQD: Tensor, scale: float) -> Tensor:
        """Return the attention (B, H, Q, D) of Q queries for each head of keys to all that is stored, dequantized piece by piece."""
        probability_BHQT = (self.stored_keys.scores(query_BHQD) * scale).softmax(dim=-1, dtype=torch.float32)
        return self.stored_values.mixed(probability_BHQT.to(query_BHQD.dtype))

    @property
    def bytes(self) -> int:
        """Bytes of what is stored."""
        return self.stored_keys.bytes + self.stored_values.bytes

    def get_seq_length(self) -> int:
        """Return the tokens that were stored."""
        return self.stored_keys.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next call attends to, and the place of the first."""
        before = self.get_seq_length()
        first = 0 if self._window is None else max(0, before - self._window + 1)
        return before - first + query_length, first

    def get_max_length(self) -> int:
        """Return the window; -1 for none."""
        return -1 if self._window is None else self._window

    def reset(self) -> None:
        """Forget everything."""
        self.stored_keys, self.stored_values = self._make()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as in transformers."""
        for store in (self.stored_keys, self.stored_values):
            store.crop(store.length - abs(tokens_to_remove))

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of both stores."""
        for store in (self.stored_keys, self.stored_values):
            store.select(rows)


def quantized(layer: Any, make: MakeStores, exact_prompt: bool = False) -> Any:
    """Return the layer that takes a layer's place, with what that one holds; raises AerogelError for a kind that is not read and written
    token by token."""
    if isinstance(layer, QuantizedCacheLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise AerogelError(
            f"the cache of this call has a {type(layer).__name__}, and only a DynamicCache is quantized; leave cache_implementation out"
        )
    window = getattr(layer, "sliding_window", None)
    made = QuantizedCacheLayer(make, window, exact_prompt)
    if layer.get_seq_length():
        if layer.get_seq_length() != layer.keys.shape[2]:
            raise AerogelError("a sliding window of this cache has moved on already; give the policy an empty cache, or one it has filled")
        made.append(layer.keys, layer.values)
    return made
