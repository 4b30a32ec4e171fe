"""Layers of a key-value cache that hold fewer positions than were seen: masks and positions of later tokens follow what was seen.

B rows, H heads, T new positions, D channels, S positions that are held. Where heads hold unlike positions, places and what is real are
(B, heads of queries, S) instead of (B, S).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from aerogel.errors import AerogelError
from aerogel.runtime.kv_cache.layer import QuantizedCacheLayer
from aerogel.runtime.tokens.kept import Kept


class ShortenedLayer:
    """Mixed into a cache layer: remembers which positions it holds."""

    _layer_type = None  # transformers registers subclasses under the type of what they inherit from
    place_BS: Tensor
    """Positions of what is held, ascending."""
    real_BS: Tensor | None
    """False where a row repeats a position, and nothing may attend; None where none does."""
    seen: int
    """Positions that came so far, kept or not."""
    _next: tuple[Kept, int]

    def expect(self, kept: Kept, positions: int) -> None:
        """Say which of the next forward's positions come."""
        self._next = kept, positions

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D) of the positions that were announced."""
        self.place_BS, self.real_BS = self.held_with(self._next[0])
        self.seen += self._next[1]
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]  # the layer's own

    def held_with(self, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """Return the positions that are held when some have come, and which of them are real."""
        heads = None if self.place_BS.ndim == 2 else self.place_BS.shape[1]

        def for_heads(x_BK: Tensor) -> Tensor:
            return x_BK if heads is None or x_BK.ndim > 2 else x_BK[:, None].expand(-1, heads, -1)

        whole_BS = torch.cat([self.place_BS, for_heads(kept.at_BK + self.seen)], dim=-1)
        if self.real_BS is None and kept.real_BK is None:
            return whole_BS, None
        pairs = (self.place_BS, self.real_BS), (kept.at_BK, kept.real_BK)
        parts = [for_heads(torch.ones_like(place, dtype=torch.bool) if real is None else real) for place, real in pairs]
        return whole_BS, torch.cat(parts, dim=-1)

    def get_seq_length(self) -> int:
        """Return the positions that were seen, by which later tokens get theirs."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the size of a mask over all that was seen; it is cut to what is held where it is used."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as in transformers."""
        self.seen -= abs(tokens_to_remove)
        stays_S = (self.place_BS < self.seen).flatten(0, -2).any(0)
        self._take(lambda x_BS: x_BS[..., stays_S])
        if bool((later_BS := self.place_BS >= self.seen).any()):  # of a row or a head that held less of what stays
            self.real_BS = ~later_BS if self.real_BS is None else self.real_BS & ~later_BS
        super().crop(-int((~stays_S).sum()))  # type: ignore[misc]

    def hold(self, at_BHS: Tensor, groups: int = 1) -> None:
        """Hold some of what is held, by its numbers for each head or for all alike (H or 1); heads of keys serve `groups` of queries."""
        rows, heads, _ = at_BHS.shape

        def change(x_BS: Tensor) -> Tensor:
            if heads == 1 and x_BS.ndim == 2:
                return x_BS.gather(1, at_BHS[:, 0])
            assert x_BS.ndim == 2, "heads that hold unlike positions are not cut again"
            return x_BS[:, None].expand(rows, heads, -1).gather(2, at_BHS).repeat_interleave(groups, dim=1)

        self._take(change)
        for name in ("keys", "values"):
            whole_BHSD = getattr(self, name)
            at_BHSD = at_BHS.to(whole_BHSD.device)[..., None].expand(-1, whole_BHSD.shape[1], -1, whole_BHSD.shape[3])
            setattr(self, name, whole_BHSD.gather(2, at_BHSD))

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self._take(lambda x_BS: x_BS[:, :0] if x_BS.ndim == 2 else x_BS[:, 0, :0])
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of other beams in place."""
        self._take(lambda x_BS: x_BS.index_select(0, beam_idx.to(x_BS.device)))
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._take(lambda x_BS: x_BS.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._take(lambda x_BS: x_BS[indices, ...])
        super().batch_select_indices(indices)  # type: ignore[misc]

    def _take(self, change: Any) -> None:
        self.place_BS = change(self.place_BS)
        self.real_BS = None if self.real_BS is None else change(self.real_BS)


def shortened(layer: Any, rows: int, device: torch.device) -> Any:
    """Return the layer that takes its place and may hold fewer positions than it has seen.

    Raises AerogelError for a kind that grows in other ways.
    """
    if isinstance(layer, ShortenedLayer):
        return layer
    if type(layer) not in _KINDS:
        raise AerogelError(
            f"the cache of this call has a {type(layer).__name__}, and tokens are dropped from a dynamic or a static cache without sliding "
            "windows only; leave cache_implementation out"
        )
    seen = layer.get_seq_length()
    made: Any = object.__new__(_KINDS[type(layer)])
    vars(made).update(vars(layer), real_BS=None, seen=seen)
    number_S = torch.arange(layer.max_cache_len if isinstance(layer, StaticLayer) else seen, device=device)
    made.place_BS = number_S.repeat(rows, 1)
    if isinstance(layer, StaticLayer):
        made.real_BS, made.seen = made.place_BS < seen, torch.as_tensor(seen, device=device).clone()
    return made


def held_with(layer: Any, kept: Kept) -> tuple[Tensor, Tensor | None]:
    """Return the positions that a layer, or None for an empty one, holds when those of a forward have come, and which are real."""
    if layer is None:
        return kept.at_BK, kept.real_BK
    found: tuple[Tensor, Tensor | None] = shortened(layer, len(kept.at_BK), kept.at_BK.device).held_with(kept)
    return found


class _ShortenedStaticLayer(ShortenedLayer, StaticLayer):
    """Has a place for every position there may be; those that are not filled are not real.

    Everything is a tensor that stays in its place, as compiled forwards want it.
    """

    seen: Any  # a tensor
    real_BS: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D) of the positions that were announced."""
        place_BS, real_BS = self.held_with(self._next[0])
        self.place_BS.copy_(place_BS)
        self.real_BS.copy_(real_BS)
        self.seen.add_(self._next[1])
        return StaticLayer.update(self, key_states, value_states, *args, **kwargs)

    def held_with(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Return the positions of all places when some have come, and which are filled."""
        slot_K = torch.arange(kept.at_BK.shape[1], device=kept.at_BK.device) + self.cumulative_length
        real_BK = torch.ones_like(kept.at_BK, dtype=torch.bool) if kept.real_BK is None else kept.real_BK
        return self.place_BS.index_copy(1, slot_K, kept.at_BK + self.seen), self.real_BS.index_copy(1, slot_K, real_BK)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the size of a mask over all positions there may be."""
        return StaticLayer.get_mask_sizes(self, query_length)

    def reset(self) -> None:
        """Forget everything."""
        self.seen.zero_()
        self.real_BS.zero_()
        StaticLayer.reset(self)


class _ShortenedDynamicLayer(ShortenedLayer, DynamicLayer):
    pass


class _ShortenedQuantizedCacheLayer(ShortenedLayer, QuantizedCacheLayer):
    pass


_KINDS: dict[type, type] = {
    DynamicLayer: _ShortenedDynamicLayer,
    StaticLayer: _ShortenedStaticLayer,
    QuantizedCacheLayer: _ShortenedQuantizedCacheLayer,
}
