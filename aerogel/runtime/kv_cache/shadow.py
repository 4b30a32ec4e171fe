"""A cache layer that keeps the keys of a prompt as small factors, and lets later tokens attend to the chunks of it that they need.

B rows, H heads of keys and values, T new tokens, N tokens of a prompt, C chunks, D channels, R rank, Q queries of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from aerogel.errors import AerogelError
from aerogel.model.kv_cache import CacheHook, cache_in, cache_layer, hooks_of
from aerogel.model.network import Network
from aerogel.numerics.chunk_selection import chunk_means, chunk_scores, factors, least_alike, rotated, rotated_back, taken, tokens_of
from aerogel.runtime.attention import Attend, attending
from aerogel.runtime.kv_cache.stored_rows import StoredRowsLayer
from aerogel.runtime.kv_cache.stores import Buffer
from aerogel.runtime.tokens.decoder import Decoder
from aerogel.runtime.tokens.scores import allowed

Angles = tuple[Tensor, Tensor]
"""Cosines and sines (B or 1, T, D) of a forward's positions."""


@dataclass(frozen=True)
class ShadowOptions:
    """Sizes of what is kept and of what is read."""

    budget: int
    """Tokens of a prompt that a later token reads, beside those that it always reads; prompts that are no longer stay as they are."""
    chunk: int
    """Tokens of a chunk."""
    rank: int
    """Rank of the factors."""
    outlier_chunks: int
    """Chunks whose keys are least like their mean: exact, and always read."""
    local_chunks: int
    """Last chunks: exact, and always read."""


class ShadowLayer(StoredRowsLayer):
    """Keys and values of one attention: exact ones, which every later token reads, and those of the other chunks of the prompt."""

    form = "a key-value cache in factors"

    def __init__(self, options: ShadowOptions) -> None:
        super().__init__()
        self._options = options
        self._angles: Angles | None = None
        self._real_BN: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.exact_keys, self.exact_values = Buffer(), Buffer()
        self._rows: dict[str, Tensor] = {}
        self._cosine_BND: Tensor
        self._sine_BND: Tensor
        self._chunked = self._seen = self._prompt = self._new = 0
        self.is_initialized = False

    def expect(self, angles: Angles, real_BN: Tensor | None = None) -> None:
        """Say by which angles the next keys are turned, and which tokens of a prompt are no padding; None: all."""
        self._angles, self._real_BN = angles, real_BN

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, D); returns them as they came: whoever reads more attends through `attend`."""
        if self._angles is None:
            raise AerogelError("this cache was filled under a policy that keeps keys in factors; put the policy on to read it")
        if not self._seen:
            self._fill(key_states, value_states, *self._angles)
        else:
            self.append(key_states, value_states)
        self._angles = None
        return key_states, value_states

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Store keys and values of later tokens, which stay exact."""
        self.exact_keys.append(keys_BHTD)
        self.exact_values.append(values_BHTD)
        self._new = keys_BHTD.shape[2]
        self._seen += self._new

    def _fill(self, key_BHND: Tensor, value_BHND: Tensor, cosine_BND: Tensor, sine_BND: Tensor) -> None:
        """Take a prompt apart."""
        options, tokens = self._options, key_BHND.shape[2]
        self.dtype, self.device, self.is_initialized = key_BHND.dtype, key_BHND.device, True
        chunks = tokens // options.chunk - options.local_chunks
        real_BN = torch.ones(len(key_BHND), tokens, dtype=torch.bool, device=key_BHND.device) if self._real_BN is None else self._real_BN
        if tokens <= options.budget or chunks <= options.outlier_chunks:
            self.append(key_BHND, value_BHND)
            self._rows = {"exact_real_BHS": real_BN[:, None].expand(-1, key_BHND.shape[1], -1)}
        else:
            self._chunked = chunks * options.chunk
            self._cosine_BND, self._sine_BND = cosine_BND, sine_BND  # one for all layers of a model
            inner_BHND = key_BHND[:, :, : self._chunked]
            inner_BN = real_BN[:, : self._chunked]
            mean_BHCD = chunk_means(inner_BHND, inner_BN, options.chunk)
            order_BHC = least_alike(inner_BHND, mean_BHCD, inner_BN).argsort(dim=-1, descending=True, stable=True)
            outlier_BHC, other_BHC = (part.sort().values for part in order_BHC.tensor_split([options.outlier_chunks], dim=-1))
            outlier_BHN = tokens_of(outlier_BHC, options.chunk)
            plain_BHND = rotated_back(key_BHND, cosine_BND[:, None], sine_BND[:, None])
            left_BNR, right_BRE = factors((plain_BHND * real_BN[:, None, :, None]).transpose(1, 2).flatten(2), options.rank)
            real_BHN = real_BN[:, None].expand(-1, key_BHND.shape[1], -1)
            self._rows = {
                "left_BNR": left_BNR[:, : self._chunked].contiguous(),
                "right_BHRD": right_BRE.unflatten(2, (key_BHND.shape[1], -1)).transpose(1, 2).contiguous(),
                "value_BHND": value_BHND[:, :, : self._chunked].contiguous(),
                "mean_BHCD": taken(mean_BHCD, other_BHC),
                "chunk_BHC": other_BHC,
                "real_BHN": real_BHN[:, :, : self._chunked],
                "real_BHC": real_BHN[:, :, : self._chunked].unflatten(2, (chunks, -1)).any(3).gather(2, other_BHC),
                "exact_real_BHS": torch.cat([real_BHN.gather(2, outlier_BHN), real_BHN[:, :, self._chunked :]], dim=2),
            }
            for exact, whole_BHND in ((self.exact_keys, key_BHND), (self.exact_values, value_BHND)):
                exact.append(torch.cat([taken(whole_BHND, outlier_BHN), whole_BHND[:, :, self._chunked :]], dim=2))
        self._prompt = self._seen = tokens
        self._new = 0

    @property
    def just_filled(self) -> bool:
        """True where nothing came behind the prompt: it attends to itself."""
        return not self._new

    def attend(self, query_BHQD: Tensor, scale: float) -> Tensor:
        """Return the attention (B, H, Q, D) of the newest tokens' queries, those of one head of queries behind those of another."""
        keys, values = [self.exact_keys.read()], [self.exact_values.read()]
        exact_BHS = self._rows["exact_real_BHS"]
        real = [nn.functional.pad(exact_BHS, (0, keys[0].shape[2] - exact_BHS.shape[2]), value=True)]
        if self._chunked:
            token_BHN = tokens_of(self._chosen(query_BHQD, scale), self._options.chunk)
            keys.insert(0, self._rebuilt(token_BHN))
            values.insert(0, taken(self._rows["value_BHND"], token_BHN))
            real.insert(0, self._rows["real_BHN"].gather(2, token_BHN))
        key_BHSD, value_BHSD, real_BHS = (torch.cat(parts, dim=2) for parts in (keys, values, real))
        sees_TS = torch.ones(self._new, key_BHSD.shape[2], dtype=torch.bool, device=query_BHQD.device).tril(key_BHSD.shape[2] - self._new)
        mask_BHQS = sees_TS.repeat(query_BHQD.shape[2] // self._new, 1) & real_BHS[:, :, None]
        return scaled_dot_product_attention(query_BHQD, key_BHSD, value_BHSD, attn_mask=mask_BHQS, scale=scale)

    def _chosen(self, query_BHQD: Tensor, scale: float) -> Tensor:
        """The numbers of the chunks that are read (B, H, C)."""
        query_BHGTD = query_BHQD.unflatten(2, (-1, self._new))
        score_BHC = chunk_scores(query_BHGTD, self._rows["mean_BHCD"], self._rows["real_BHC"], scale)
        count = min(max(1, self._options.budget // self._options.chunk), score_BHC.shape[2])
        return self._rows["chunk_BHC"].gather(2, score_BHC.topk(count, dim=-1).indices)

    def _rebuilt(self, token_BHN: Tensor) -> Tensor:
        """The keys of some tokens, from the factors."""
        rows, heads = token_BHN.shape[:2]
        left_BHNR = taken(self._rows["left_BNR"][:, None].expand(-1, heads, -1, -1), token_BHN)
        angles = (x_BND.expand(rows, -1, -1)[:, None].expand(-1, heads, -1, -1) for x_BND in (self._cosine_BND, self._sine_BND))
        return rotated(left_BHNR @ self._rows["right_BHRD"], *(taken(x_BHND, token_BHN) for x_BHND in angles))

    @property
    def bytes(self) -> int:
        """Bytes of what is stored."""
        return self.exact_keys.bytes + self.exact_values.bytes + sum(x.nbytes for x in self._rows.values())

    def get_seq_length(self) -> int:
        """Return the tokens that were seen."""
        return self._seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, their number negative as in transformers; raises AerogelError where some are of the prompt."""
        kept = self._seen - abs(tokens_to_remove)
        if kept < self._prompt:
            raise AerogelError("tokens of the prompt of a cache that keeps keys in factors cannot be forgotten; read the prompt again")
        for exact in (self.exact_keys, self.exact_values):
            exact.change(lambda x: x[:, :, : x.shape[2] - abs(tokens_to_remove)])
        self._seen = kept

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is stored."""
        self.exact_keys.change(rows)
        self.exact_values.change(rows)
        self._rows = {name: rows(x) for name, x in self._rows.items()}
        if self._chunked and len(self._cosine_BND) > 1:
            self._cosine_BND, self._sine_BND = rows(self._cosine_BND), rows(self._sine_BND)


class _ShadowHook(CacheHook):
    """Before an attention: puts a shadow layer in the place of an empty one, and tells it the angles that come."""

    def __init__(self, index: int, options: ShadowOptions, running: dict[int, ShadowLayer]) -> None:
        super().__init__(index, lambda layer: layer if isinstance(layer, ShadowLayer) else _made(layer, options))
        self._running = running

    def _put(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.pop(self.index, None)
        cache = cache_in(args, kwargs)
        if cache is None:
            return
        super()._put(module, args, kwargs)
        layer = cache_layer(cache, self.index)
        mask = kwargs.get("attention_mask")
        real_BN = allowed(mask[:, 0, -1]) if mask is not None and not layer.get_seq_length() else None
        layer.expect(angles_of(kwargs), real_BN)
        self._running[self.index] = layer


def angles_of(kwargs: dict[str, Any]) -> Angles:
    """Return the rotary angles that an attention is given; raises AerogelError where there are none of one axis."""
    found = kwargs.get("position_embeddings")
    if not isinstance(found, tuple) or len(found) != 2 or any(part.ndim != 3 for part in found):
        raise AerogelError("the attentions of this model are given no rotary angles of one axis to turn keys back by; leave this step out")
    return found[0], found[1]


def _made(layer: Any, options: ShadowOptions) -> ShadowLayer:
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise AerogelError(
            f"the cache of this call has a {type(layer).__name__} with {layer.get_seq_length()} tokens, and keys are kept in factors in "
            "place of an empty layer of a DynamicCache; leave cache_implementation out"
        )
    return ShadowLayer(options)


@contextmanager
def shadowed(network: Network, decoder: Decoder, options: ShadowOptions) -> Iterator[None]:
    """Let every cache keep the keys of its prompt in factors, and later tokens read some chunks of it.

    Raises AerogelError where another policy replaces the layers of the cache.
    """
    running: dict[int, ShadowLayer] = {}
    places = dict(zip(decoder.attentions, decoder.places, strict=True))
    if taken_by := [name for name in places if hooks_of(network.module.get_submodule(name))]:
        raise AerogelError(f"the cache of {taken_by[0]} is quantized by another policy; leave one of them out")
    with ExitStack() as stack:
        for name, place in places.items():
            module = network.module.get_submodule(name)
            hook = _ShadowHook(place, options, running)
            stack.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        stack.enter_context(attending(network, places, lambda name: _answering(running, places[name]), cache_only=True))
        yield


def _answering(running: dict[int, ShadowLayer], place: int) -> Attend:
    return partial(_attend, running, place)


def _attend(running: dict[int, ShadowLayer], place: int, query_BHTD: Tensor, key_BHSD: Tensor, *given: Any, **more: Any) -> Tensor:
    layer = running.pop(place, None)
    if layer is None or layer.just_filled:
        return scaled_dot_product_attention(query_BHTD, key_BHSD, *given, **more)
    heads, tokens = layer.exact_keys.read().shape[1], query_BHTD.shape[2]
    scale = query_BHTD.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    query_BHQD = query_BHTD.unflatten(1, (heads, -1)).flatten(2, 3)
    return layer.attend(query_BHQD, scale).unflatten(2, (-1, tokens)).flatten(1, 2)
