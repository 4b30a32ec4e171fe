"""Eviction: layers of a key-value cache forget positions; what is left keeps its position, and later tokens attend to it alone.

B rows, H heads of keys and values, Q queries, S positions that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.numerics.token_selection import best
from aerogel.runtime.tokens.kept import Kept
from aerogel.runtime.tokens.scores import QueryKey, allowed


class Eviction:
    """Base of rules of eviction; `first_B` is the first position of each row that is no padding."""

    watches: ClassVar[bool] = False
    """True where it reads the queries and keys of prompts."""
    prompts_only: ClassVar[bool] = True
    """True where it acts when a prompt has been read and never again."""

    def before(self, layer: Any, first_B: Tensor) -> None:
        """Act on a layer before a forward adds to it."""

    def narrowed(self, mask: Tensor | None, query_BQ: Tensor, key_BS: Tensor, first_B: Tensor) -> Tensor | None:
        """Return the attention mask of a forward's queries, at these positions, that hides what they no longer see."""
        return mask

    def after(self, layer: Any, first_B: Tensor) -> None:
        """Act on a layer when a forward of several positions has added to it."""

    def read(self, layer: Any, seen: QueryKey) -> None:
        """Act on a layer that a prompt has just filled, while the prompt attends to itself."""

    def finish(self, layer: Any, left: Kept, positions: int) -> None:
        """Act on a layer when all blocks have computed; `left` are those of the forward's positions that the last block did."""


class SlidingWindow(Eviction):
    """Every token attends to the first tokens of its row and to the latest ones up to itself, so many in all."""

    prompts_only = False

    def __init__(self, sink: int, window: int) -> None:
        """Let every token see `window` positions, `sink` first ones among them."""
        self.sink, self.window = sink, window

    def before(self, layer: Any, first_B: Tensor) -> None:
        """Forget what the next position does not see."""
        self._trim(layer, first_B, self.window - 1)

    def narrowed(self, mask: Tensor | None, query_BQ: Tensor, key_BS: Tensor, first_B: Tensor) -> Tensor | None:
        """Hide what lies between the first positions and the latest ones."""
        recent_BQS = key_BS[:, None] > query_BQ[..., None] - (self.window - self.sink)
        seen_BQS = recent_BQS | self._is_sink(key_BS, first_B)[:, None]
        past_BQS = key_BS[:, None] <= query_BQ[..., None]
        if not bool((past_BQS & ~seen_BQS).any()):
            return mask
        if mask is None:
            return (past_BQS & seen_BQS)[:, None]
        hidden = ~seen_BQS[:, None]
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def after(self, layer: Any, first_B: Tensor) -> None:
        """Forget what the last position did not see."""
        self._trim(layer, first_B, self.window)

    def _trim(self, layer: Any, first_B: Tensor, count: int) -> None:
        if layer.place_BS.shape[1] <= count:
            return
        # Where the first tokens lie in the window, padding before them fills up the row, which nothing attends to.
        score_BS = layer.place_BS.double().masked_fill(self._is_sink(layer.place_BS, first_B), torch.inf)
        keep_BS = best(score_BS, torch.ones_like(score_BS, dtype=torch.bool), torch.full_like(first_B, count))
        layer.hold(Kept.of(keep_BS).at_BK[:, None])

    def _is_sink(self, key_BS: Tensor, first_B: Tensor) -> Tensor:
        return (key_BS >= first_B[:, None]) & (key_BS < first_B[:, None] + self.sink)


class PromptEviction(Eviction):
    """Each head keeps some positions of a prompt once it is read; the prompt attends to all of them."""

    watches = True

    def __init__(self, score: Callable[[QueryKey, Tensor, int], Tensor], count: Callable[[int], int]) -> None:
        """Keep the positions with the highest scores: `score(queries and keys, real_BS, heads of keys)` (B, H, S), infinite where one
        stays for sure, and `count(positions)` of them.
        """
        self._score, self._count = score, count

    def read(self, layer: Any, seen: QueryKey) -> None:
        """Choose what stays."""
        heads, positions = layer.keys.shape[1:3]
        count = min(self._count(layer.seen), positions)
        if count == positions:
            return
        real_BS = seen.last_sees()
        score_BHS = self._score(seen, real_BS, heads).masked_fill(~real_BS[:, None], -1)  # scores are at least zero
        flat_RS = score_BHS.flatten(0, 1)
        keep_RS = best(flat_RS, torch.ones_like(flat_RS, dtype=torch.bool), torch.full_like(flat_RS[:, 0], count, dtype=torch.int64))
        layer.hold(Kept.of(keep_RS).at_BK.unflatten(0, (-1, heads)), seen.query_BHLD.shape[1] // heads)


class FinalPositions(Eviction):
    """Every layer forgets the positions of a prompt that were dropped before the last block."""

    def finish(self, layer: Any, left: Kept, positions: int) -> None:
        """Forget them."""
        count_BN = torch.zeros(len(left.at_BK), positions, dtype=torch.int64, device=left.at_BK.device)
        real_BK = torch.ones_like(left.at_BK, dtype=torch.bool) if left.real_BK is None else left.real_BK
        stays_BN = count_BN.scatter_add(1, left.at_BK, real_BK.long()) > 0
        number_BS = layer.place_BS - (layer.seen - positions)
        keep_BS = (number_BS < 0) | stays_BN.gather(1, number_BS.clamp(min=0))
        keep_BS = keep_BS if layer.real_BS is None else keep_BS & layer.real_BS
        if bool(keep_BS.all()):
            return
        kept = Kept.of(keep_BS)
        layer.hold(kept.at_BK[:, None])
        layer.real_BS = kept.real_BK  # what repeated a position before is not among those that stay


def first_positions(mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Return the first position of each row that its last query sees (B), by an attention mask (B or 1, H or 1, Q, S)."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.int64, device=device)
    return allowed(mask[:, 0, -1]).int().argmax(-1).expand(rows)
