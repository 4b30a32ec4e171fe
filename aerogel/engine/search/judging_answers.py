"""Cost and gain of skipped experts: predictions, answers and seconds on held-out text or chats, beside those with all experts.

B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.evaluate.exact_match import ExactMatch, skipped
from aerogel.evaluate.generation import continued
from aerogel.kernels.synchronized_clock import now
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.token_types import Vocabulary

NEW_TOKENS = 16
"""Tokens written after a prompt where none ends by itself: for the clock, and behind text."""

On = Callable[[], AbstractContextManager[Any]]
"""Puts a policy on for a while."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out data that policies are judged by and never calibrated on."""

    calls: Sequence[Call]
    chats: Sequence[Chat] = ()
    """The same with what is replied, where it is chats."""

    def prompts(self, network: Network) -> dict[str, Any]:
        """A batch of prompts: the first chats without their answers, or the first half of each sequence of text."""
        ids_BS = self.calls[0].kwargs["input_ids"]
        if self.chats:
            return next(iter(chats.prompts(self.chats, network.processor, len(ids_BS), network.device)))
        prompt_BS = ids_BS[:, : max(ids_BS.shape[1] // 2, 1)]
        return {"input_ids": prompt_BS, "attention_mask": torch.ones_like(prompt_BS)}


class Turn(NamedTuple):
    """Seconds of a prompt's forward, and of each token behind it in the median."""

    prefill: float
    decode: float


class Judge:
    """Predictions, answers and speed of the model with all experts, and policies compared with them."""

    def __init__(self, network: Network, held_out: HeldOut, rounds: int, clock: Callable[[], float]) -> None:
        self.network, self._held_out, self._rounds, self._clock = network, held_out, rounds, clock
        self._vocabulary = Vocabulary.of(network)
        self._answers = Answers(network, held_out.calls, self._vocabulary)
        self._prompts = held_out.prompts(network)
        self._turn()  # kernels are chosen and memory grows in it
        self.turns = [self._turn() for _ in range(rounds)]
        """Of the model with all experts."""
        self.right = self._written()

    @property
    def conditions(self) -> dict[str, Any]:
        """Return the description of the held-out data."""
        rows, positions = self._prompts["input_ids"].shape
        return {
            "count": len(self._held_out.chats) or sum(len(call.kwargs["input_ids"]) for call in self._held_out.calls),
            "chats": bool(self._held_out.chats),
            "answer_tokens": self._answers.tokens,
            "right": self.right,
            "batch": rows,
            "prompt": positions,
            "new_tokens": NEW_TOKENS,
            "rounds": self._rounds,
            "prefill_seconds": median(turn.prefill for turn in self.turns),
            "decode_seconds": median(turn.decode for turn in self.turns),
        }

    def policy(self, on: On) -> dict[str, Any]:
        """Return how far predictions move, the share of dropped assignments, that of right answers, and the speed-up."""
        with on(), counting(self.network, self._vocabulary) as read:
            kl, top1 = self._answers.moved()
        with on(), counting(self.network, self._vocabulary) as written:
            right = self._written()
        self._turn(on)
        pairs = [(self._turn(), self._turn(on)) for _ in range(self._rounds)]
        self.turns += [whole for whole, _ in pairs]
        return {
            "kl": kl,
            "top1": top1,
            "ratio": read.ratio(),
            "skipped": skipped(written),
            "right": right,
            "prefill_speedup": median(whole.prefill / ours.prefill for whole, ours in pairs),
            "decode_speedup": median(whole.decode / ours.decode for whole, ours in pairs),
        }

    def _written(self) -> float | None:
        """The share of chats that are replied to as they should be; of text, which has no right continuation, nothing."""
        if self._held_out.chats:
            return ExactMatch().right(self.network, self._held_out.chats)
        continued(self.network, self._prompts, NEW_TOKENS)
        return None

    def _turn(self, on: On = nullcontext) -> Turn:
        """Write behind the prompts; the same number of tokens each time, whatever they are."""
        times: list[float] = []
        module = self.network.module

        def look(*_: Any) -> None:
            times.append(now(self.network.device, self._clock))

        with on():
            hooks = [module.register_forward_pre_hook(look, prepend=True), module.register_forward_hook(look)]
            try:
                continued(self.network, self._prompts, NEW_TOKENS, exactly=True)
            finally:
                for hook in hooks:
                    hook.remove()
        spans = [end - start for start, end in zip(times[::2], times[1::2], strict=True)]
        return Turn(spans[0], median(spans[1:]))
