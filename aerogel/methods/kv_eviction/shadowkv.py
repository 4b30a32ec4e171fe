"""ShadowKV: keys of a prompt in small factors, of which later tokens rebuild the chunks that they need (arXiv:2410.21465).

The variant for accuracy of the public code. Its scale is that of heads of 128 channels; here it is that of the model's heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from aerogel.errors import AerogelError
from aerogel.methods.base import Before
from aerogel.methods.kv_eviction.policy import EvictionState, SelectivePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.rotary import rotary_of
from aerogel.numerics.chunk_selection import rotated_back
from aerogel.options import Count, CountOrZero
from aerogel.runtime.kv_cache.shadow import ShadowOptions, angles_of, shadowed
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import drops_text, evicts

_ALIKE = 0.05
"""Largest relative error of keys that are turned back: roundings of 16 bits stay far below."""

_OTHERWISE = (
    "the keys of this {} model are not turned in halves of all their channels, so that factors of them cannot be taken before that: leave "
    "this step out"
)


@dataclass(frozen=True)
class Shadowkv(SelectivePolicy):
    """Stores keys of a prompt as factors of low rank, and lets later tokens read the chunks of it with the best means.

    It acts on the forward that fills an empty cache.
    """

    exact_prompt: ClassVar[bool] = True
    """Forwards of a prompt are not changed; what is read behind it is."""

    budget: Count = 1024
    """Tokens of a prompt that are chosen for a later token; prompts that are no longer stay as they are."""
    rank: Count = 160
    """Rank of the factors of the keys of all heads together."""
    chunk: Count = 8
    """Tokens that are chosen together, by the mean of their keys."""
    outlier_chunks: CountOrZero = 48
    """Chunks of each head whose keys are least like their mean: their keys stay exact, and they are always read."""
    local_chunks: CountOrZero = 4
    """Last chunks of a prompt: their keys stay exact, and they are always read."""

    @property
    def held(self) -> int:
        """Number of positions up to which all are read."""
        return max(self.budget, (self.outlier_chunks + self.local_chunks) * self.chunk)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the budget and the chunks."""
        if self.budget < self.chunk:
            yield f"budget is {self.budget}, expected at least chunk, which is {self.chunk}"
        rotary = rotary_of(network.config)
        if rotary.has_axes or rotary.kind is None:
            yield "the attentions of this model are given no rotary angles of one axis to turn keys back by; leave this step out"
        elif not rotary.turns_all:
            yield _OTHERWISE.format(network.family.name)

    @torch.no_grad()
    def calibrate(self, network: Network, calls: list[Call]) -> EvictionState:  # type: ignore[override]
        """See that keys can be turned back, and measure what the factors and the choice cost."""
        _require_rotation(network, int(calls[0].kwargs["input_ids"][0, -1]))
        return super().calibrate(network, calls)

    @contextmanager
    def acting(self, network: Network) -> Iterator[None]:
        """Let the rule act for a while; raises AerogelError beside another policy that drops or evicts tokens."""
        if drops_text(network) or evicts(network):
            raise AerogelError("a policy that drops tokens or evicts them from the cache is on already; leave one of them out")
        options = ShadowOptions(self.budget, self.chunk, self.rank, self.outlier_chunks, self.local_chunks)
        with shadowed(network, decoder_of(network), options):
            yield


def _require_rotation(network: Network, token: int) -> None:
    """Raise AerogelError unless keys of one token at several positions are the same in the first block, once they are turned back."""
    decoder, seen = decoder_of(network), []
    attention = network.module.get_submodule(decoder.attentions[0])
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(angles_of(kwargs)), with_kwargs=True)
    try:
        ids_BN = torch.full((1, 8), token, device=network.device)
        cache = network.run(Call((), {"input_ids": ids_BN, "use_cache": True})).past_key_values
    finally:
        handle.remove()
    key_BHND = cache.layers[decoder.places[0]].keys
    cosine_BND, sine_BND = (part.to(key_BHND.device) for part in seen[0])
    if cosine_BND.shape[-1] == key_BHND.shape[-1]:
        plain_BHND = rotated_back(key_BHND.float(), cosine_BND[:, None].float(), sine_BND[:, None].float())
        if (plain_BHND - plain_BHND[:, :, :1]).norm() <= _ALIKE * plain_BHND.norm():
            return
    raise AerogelError(_OTHERWISE.format(network.family.name))
