"""Attention between positions, computed from the queries and keys that a block attends with itself: after norms and rotary embedding.

B rows, H heads, L queries, R of them that ask, S keys, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aerogel.errors import AerogelError
from aerogel.model.hooks import Stop, until
from aerogel.model.network import Network
from aerogel.runtime.attention import answered, attending, attention_received


@dataclass(frozen=True)
class QueryKey:
    """Queries and keys of one attention."""

    query_BHLD: Tensor
    key_BHSD: Tensor
    """Keys, for each head of queries."""
    mask: Tensor | None
    """Boolean, or to be added."""
    scale: float
    causal: bool
    """True where each query sees the keys up to its own position only."""

    @classmethod
    def of(cls, query_BHLD: Tensor, key_BHSD: Tensor, *_: Any, **more: Any) -> QueryKey:
        """Take the arguments of scaled_dot_product_attention."""
        heads = query_BHLD.shape[1] // key_BHSD.shape[1]
        key_BHSD = key_BHSD.repeat_interleave(heads, dim=1) if heads > 1 else key_BHSD
        scale = query_BHLD.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
        return cls(query_BHLD, key_BHSD, more.get("attn_mask"), scale, bool(more.get("is_causal")))

    def last_sees(self) -> Tensor:
        """Return the keys that the last query sees (B, S): those that are no padding, in a prompt."""
        rows, _, keys, _ = self.key_BHSD.shape
        if self.mask is None:
            return torch.ones(rows, keys, dtype=torch.bool, device=self.key_BHSD.device)
        return allowed(self.mask[:, 0, -1]).expand(rows, -1)

    def first_keys(self, count: int) -> QueryKey:
        """Return it with so many keys: what comes behind them is room that nothing fills yet."""
        mask = None if self.mask is None else self.mask[..., :count]
        return replace(self, key_BHSD=self.key_BHSD[:, :, :count], mask=mask)

    def products(self, asking_BR: Tensor) -> Tensor:
        """Return the products (B, H, R, S) of some queries, by their numbers, with all keys, float32: neither scaled nor masked."""
        _, heads, _, channels = self.query_BHLD.shape
        query_BHRD = self.query_BHLD.gather(2, asking_BR[:, None, :, None].expand(-1, heads, -1, channels))
        return (query_BHRD @ self.key_BHSD.transpose(-2, -1)).float()

    def attention(self, asking_BR: Tensor) -> Tensor:
        """Return the attention (B, H, R, S) of some queries, by their numbers, to all keys, float32."""
        rows, _, queries, _ = self.query_BHLD.shape
        keys = self.key_BHSD.shape[2]
        asked = asking_BR[:, None, :, None]
        score_BHRS = self.products(asking_BR) * self.scale
        if self.causal:
            later = torch.arange(keys, device=asking_BR.device) > asking_BR[:, None, :, None] + (keys - queries)
            score_BHRS = score_BHRS.masked_fill(later, -torch.inf)
        if self.mask is not None:
            mask = self.mask.expand(rows, -1, queries, keys)
            mask = mask.gather(2, asked.expand(-1, mask.shape[1], -1, keys))
            score_BHRS = score_BHRS.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score_BHRS + mask
        return score_BHRS.softmax(-1).nan_to_num()  # a query that may see nothing, such as padding, asks for nothing


def allowed(mask: Tensor) -> Tensor:
    """Return a mask, boolean or to be added, as booleans."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attention_in_image(attention: QueryKey, class_token: bool) -> Tensor:
    """Return the attention of a vision tower to each patch of images (B, S), a mean over heads: from all patches of the image.

    Where the first position is a class token, it alone asks, and is left out.
    """
    if not class_token:
        given = attention.query_BHLD, attention.key_BHSD, attention.mask, attention.scale
        return attention_received(*given) / attention.query_BHLD.shape[2]
    first = torch.zeros(len(attention.query_BHLD), 1, dtype=torch.int64, device=attention.query_BHLD.device)
    return attention.attention(first).mean(1)[:, 0, 1:]


def of_block(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> QueryKey:
    """Return the queries and keys that a block would attend with; what comes after them in the block does not run.

    Raises AerogelError where the block does not call scaled_dot_product_attention.
    """
    stop, found = Stop(), []

    def see(*given: Any, **more: Any) -> Tensor:
        found.append(QueryKey.of(*given, **more))
        raise stop

    with until(stop), answered(see):
        block.forward(*args, **_without_cache(kwargs))
    if not found:
        raise AerogelError(
            f"{type(block).__name__} does not call scaled_dot_product_attention, from which scores are read; "
            "open the model with attn_implementation='sdpa', or choose a rule without attention"
        )
    return found[0]


def behind_blocks(blocks: Iterable[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states behind some blocks in a row, for the arguments of the first; no cache is read or written."""
    for block in blocks:
        output = block.forward(*args, **_without_cache(kwargs))
        args = (output[0] if isinstance(output, tuple) else output, *args[1:])
    return args[0]


def _without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("past_key_values", "past_key_value", "use_cache")}


@contextmanager
def watching(network: Network, attentions: Mapping[int, str], see: Callable[[int, QueryKey], None]) -> Iterator[None]:
    """Call `see(number, queries and keys)` when one of these attentions, by number, computes for more than one position."""

    def watch(number: int) -> Callable[..., Tensor]:
        def attend(query_BHLD: Tensor, key_BHSD: Tensor, *given: Any, **more: Any) -> Tensor:
            if query_BHLD.shape[2] > 1:
                see(number, QueryKey.of(query_BHLD, key_BHSD, *given, **more))
            return scaled_dot_product_attention(query_BHLD, key_BHSD, *given, **more)

        return attend

    numbers = {name: number for number, name in attentions.items()}
    with attending(network, attentions.values(), lambda name: watch(numbers[name]), cache_only=True):
        yield
