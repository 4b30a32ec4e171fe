"""Perplexity by decoding: token by token through the key-value cache, as the model writes text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aerogel.data import text
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import TextMeasure, Window, require_finite
from aerogel.model.calls import Call
from aerogel.model.kv_cache import bytes_per_token, replaces_layers
from aerogel.model.network import Network
from aerogel.options import Batch, Tokens
from aerogel.runtime.tokens.shortening import evicts


@dataclass(frozen=True)
class DecodePerplexity(TextMeasure):
    """Perplexity on held-out text with every scored token read from the key-value cache: what smaller caches cost shows here only.

    The windows are those of `perplexity`. What comes before the scored tokens of a window is read in one forward that fills the cache; then
    one token a forward. A model whose cache is not quantized gets the perplexity of its windows but for rounding.
    """

    asked: ClassVar[bool] = True

    tokens: Tokens = 2048
    """Tokens read from the start of the source; 0 reads all."""
    length: Tokens = 512
    """Tokens per window; limited to the number of positions of the model."""
    stride: Tokens = 256
    """Tokens by which the window moves, which are decoded one by one."""
    batch: Batch = 8
    """Windows that are decoded together."""

    @classmethod
    def is_usual(cls, network: Network) -> bool:
        """Return True where a policy quantizes the cache or evicts from it."""
        return replaces_layers(network) or evicts(network)

    def measure(self, network: Network, against: Network | None = None) -> dict[str, Any]:
        """Return perplexity, nats_per_token, cache_bytes_per_token (of all layers), the scored tokens and what was read."""
        stream_T, total, count = self.stream(network), 0.0, 0
        size, cache = 0.0, None
        with self.reading(network), torch.no_grad():
            for window in self.windows(network, stream_T):
                for logits_BV, labels_B, at_end in _decoded(network, window):
                    require_finite(logits_BV, network, "decode_perplexity")
                    total += float(cross_entropy(logits_BV.float(), labels_B, reduction="sum").double())
                    count, cache = count + len(labels_B), at_end
                size = bytes_per_token(cache, len(window.input_ids))
        nats = total / count
        return {
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            "nats_per_token": nats,
            "cache_bytes_per_token": size,
            "tokens": count,
            "source": str(self.source),
            "length": self.length,
            "stride": self.stride,
            "fingerprint": text.fingerprint(stream_T),
        }


def _decoded(network: Network, window: Window) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Yield (logits_BV, labels_B, cache) for each scored token."""
    ids_BL, options = window.input_ids, dict[str, Any](use_cache=True)
    if "logits_to_keep" in inspect.signature(network.module.forward).parameters:
        options["logits_to_keep"] = 1
    start = ids_BL.shape[1] - window.scored
    read_BL, filled = ids_BL[:, :start], dict[str, Any]()
    for place in range(start, ids_BL.shape[1]):
        found = network.run(Call((), {"input_ids": read_BL, **options, **filled}))
        if getattr(found, "past_key_values", None) is None:
            raise AerogelError(f"decode_perplexity: this {network.family.name} model gives back no key-value cache; leave this measure out")
        filled = {"past_key_values": found.past_key_values}
        yield found.logits[:, -1], ids_BL[:, place], found.past_key_values
        read_BL = ids_BL[:, place : place + 1]
