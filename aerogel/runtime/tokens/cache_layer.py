"""Layers of a key-value cache that hold fewer positions than were seen: masks and positions of later tokens follow what was seen.

B rows, H heads, T new positions, D channels, S positions that are held. Where heads hold unlike positions, places and what is real are
(B, heads of queries, S) instead of (B, S).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

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
        self.place_BS, self.real_BS = held_with(self, self._next[0])
        self.seen += self._next[1]
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]  # the layer's own

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
            at_BHSD = at_BHS[..., None].expand(-1, whole_BHSD.shape[1], -1, whole_BHSD.shape[3])
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
            f"the cache of this call has a {type(layer).__name__}, and tokens are dropped from a DynamicCache without sliding windows "
            "only; leave cache_implementation out"
        )
    seen = layer.get_seq_length()
    made: Any = object.__new__(_KINDS[type(layer)])
    vars(made).update(vars(layer), place_BS=torch.arange(seen, device=device).expand(rows, -1), real_BS=None, seen=seen)
    return made


def held_with(layer: Any, kept: Kept) -> tuple[Tensor, Tensor | None]:
    """Return the positions that a layer, or None for an empty one, holds when those of a forward have come, and which are real."""
    if layer is None:
        return kept.at_BK, kept.real_BK
    rows, device = len(kept.at_BK), kept.at_BK.device
    seen = layer.get_seq_length()
    if isinstance(layer, ShortenedLayer):
        place_BS, real_BS = layer.place_BS, layer.real_BS
    else:
        place_BS, real_BS = torch.arange(seen, device=device).expand(rows, -1), None
    heads = () if place_BS.ndim == 2 else (place_BS.shape[1],)

    def for_heads(x_BK: Tensor) -> Tensor:
        return x_BK if x_BK.ndim > 2 or not heads else x_BK[:, None].expand(-1, *heads, -1)

    whole_BS = torch.cat([place_BS, for_heads(kept.at_BK + seen)], dim=-1)
    if real_BS is None and kept.real_BK is None:
        return whole_BS, None
    parts = [
        for_heads(torch.ones_like(place, dtype=torch.bool) if real is None else real)
        for place, real in ((place_BS, real_BS), (kept.at_BK, kept.real_BK))
    ]
    return whole_BS, torch.cat(parts, dim=-1)


class _ShortenedDynamicLayer(ShortenedLayer, DynamicLayer):
    pass


class _ShortenedQuantizedCacheLayer(ShortenedLayer, QuantizedCacheLayer):
    pass


_KINDS: dict[type, type] = {DynamicLayer: _ShortenedDynamicLayer, QuantizedCacheLayer: _ShortenedQuantizedCacheLayer}
