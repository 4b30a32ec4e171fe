"""Text from a causal language model: prompt in one pass, then token by token by the fastest decoder the model allows.

Letters in names: B rows of the batch, T tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from aerogel.errors import AerogelError
from aerogel.inference.decoder import FastDecoder, refuse
from aerogel.inference.sparse_layers import SparseLayers
from aerogel.kernels.synchronized_clock import now
from aerogel.model.network import Network

_AGREEMENT = 0.05
"""Largest relative norm by which the fast decoder's logits may differ from the model's own: kernels of other roundings stay far below."""


@dataclass
class Generation:
    """Generated tokens and how they were made."""

    tokens: Tensor
    """New tokens (B, N), int64; a row that ended repeats its last token."""
    path: str
    """`fast_decoder`, or `transformers` where the network's own forward made every token."""
    reason: str | None
    """Reason why it is not the fast decoder."""
    prefill_seconds: float
    """Time until the prompt's keys and values and its last logits were there."""
    first_token_seconds: float
    """Time until the first token was there."""
    step_seconds: list[float] = field(default_factory=list)
    """Time of each new token after the first."""


class Generator:
    """Generates from one network again and again with what it packed once; `batch` rows, at most `length` tokens with the prompt."""

    def __init__(self, network: Network, batch: int, length: int, fast_decoder: bool = True) -> None:
        """Bring in weights that are still on disk; with `fast_decoder` off the network's own forward makes every token.

        Raises AerogelError for a network that is no language model.
        """
        self.module: Any = network.module.eval()
        if not hasattr(self.module, "lm_head") and not hasattr(self.module, "generate"):
            raise AerogelError(f"{type(self.module).__name__} is no causal language model; text can be generated from those only")
        if network.checkpoint is not None:
            network.checkpoint.materialise(self.module, device=network.device)
        self.batch, self.length = batch, length
        self.reason = refuse(self.module, length) if fast_decoder else "not asked for"
        self._decoder: FastDecoder | None = None
        self._sparse = SparseLayers(self.module)

    @torch.no_grad()
    def generate(
        self, tokens_BT: Tensor, new_tokens: int, temperature: float = 0.0, stop: frozenset[int] = frozenset(), seed: int = 0
    ) -> Generation:
        """Continue every row by `new_tokens`, or until all rows have met a token of `stop`.

        The likeliest token at temperature 0, a sample otherwise. Raises AerogelError when the prompt and the new tokens do not fit.
        """
        batch, prompt = tokens_BT.shape
        if batch != self.batch or prompt < 1 or new_tokens < 1 or prompt + new_tokens > self.length:
            raise AerogelError(
                f"prompts of shape {tuple(tokens_BT.shape)} and {new_tokens} new tokens do not fit a generator of {self.batch} rows "
                f"and {self.length} tokens"
            )
        random = torch.Generator().manual_seed(seed)
        start = now(tokens_BT.device)
        cache = DynamicCache(config=self.module.config)
        logits_BV = self._forward(tokens_BT, cache)
        prefill = now(tokens_BT.device) - start
        first_B = _pick(logits_BV, temperature, random)
        first = now(tokens_BT.device) - start
        decoder = self._enter(first_B, prompt, cache)

        def advance(tokens_B: Tensor, position: int) -> Tensor:
            if decoder is None:
                return _pick(self._forward(tokens_B[:, None], cache), temperature, random)
            hidden_BC = decoder.hidden(tokens_B, position)
            return decoder.head.best(hidden_BC) if temperature == 0 else _pick(decoder.head.logits(hidden_BC), temperature, random)

        tokens_BN, seconds = _advance(advance, first_B, prompt, new_tokens, stop)
        return Generation(tokens_BN, "transformers" if decoder is None else "fast_decoder", self.reason, prefill, first, seconds)

    def _forward(self, tokens_BT: Tensor, cache: DynamicCache) -> Tensor:
        """The network's own forward; returns the logits (B, V) of the last token."""
        with self._sparse.on():
            return self.module(input_ids=tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _enter(self, tokens_B: Tensor, position: int, cache: DynamicCache) -> FastDecoder | None:
        """Hand the prompt over to the fast decoder, if there is one; the first time, see whether it computes what the network does next."""
        if any(getattr(layer, "real_BS", None) is not None for layer in cache.layers):
            self.reason = "the cache holds unlike numbers of positions of its rows"
        if self.reason is not None:
            return None
        known = self._decoder is not None
        decoder = self._decoder = self._decoder or FastDecoder(self.module, self.batch, self.length)
        if not known:
            decoder.fill(copy.deepcopy(cache).layers)
            ours_BV = decoder.head.logits(decoder.hidden(tokens_B, position))
            theirs_BV = self._forward(tokens_B[:, None], copy.deepcopy(cache))
            distance = ((ours_BV - theirs_BV).norm() / theirs_BV.norm()).item()
            if not distance <= _AGREEMENT:
                self.reason = f"the fast decoder's logits are {distance:.2g} away in relative norm: a block does more than its parts say"
                self._decoder = None
                return None
        decoder.fill(cache.layers)
        return decoder


def _advance(
    advance: Callable[[Tensor, int], Tensor], tokens_B: Tensor, position: int, count: int, stop: frozenset[int]
) -> tuple[Tensor, list[float]]:
    """Call `advance` until `count` tokens are there or every row has ended; returns the tokens (B, N) and the time of each step."""
    ends = torch.tensor(sorted(stop), device=tokens_B.device)
    chosen, seconds = [tokens_B], []
    ended_B = torch.isin(tokens_B, ends)
    while len(chosen) < count and not (stop and ended_B.all()):
        start = now(tokens_B.device)
        next_B = advance(chosen[-1], position)
        if stop:
            next_B = torch.where(ended_B, chosen[-1], next_B)
            ended_B |= torch.isin(next_B, ends)
        chosen.append(next_B)
        position += 1
        seconds.append(now(tokens_B.device) - start)
    return torch.stack(chosen, dim=1), seconds


def _pick(logits_BV: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """The likeliest tokens (B) at temperature 0, otherwise a sample, drawn on the host: of one seed the same on every device."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    chances_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).to(random.device)
    return torch.multinomial(chances_BV, 1, generator=random)[:, 0].to(logits_BV.device)
