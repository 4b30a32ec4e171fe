"""Cost and gain of a policy: predictions, answers and seconds on held-out data, beside those of the model without it.

B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

from aerogel.engine.search.held_out import HeldOut
from aerogel.evaluate.exact_match import ExactMatch, skipped
from aerogel.evaluate.generation import continued
from aerogel.evaluate.needle_recall import NeedleRecall
from aerogel.kernels.synchronized_clock import now
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.predictions import Continuations, Predictions
from aerogel.runtime.token_types import Vocabulary

NEW_TOKENS = 16
"""Tokens written after a prompt where none ends by itself: for the clock, and behind text."""

On = Callable[[], AbstractContextManager[Any]]
"""Puts a policy on for a while."""


class Turn(NamedTuple):
    """Seconds of a prompt's forward, and of each token behind it in the median."""

    prefill: float
    decode: float


class Judge:
    """Predictions, answers and speed of the model without a policy, and policies compared with them."""

    def __init__(self, network: Network, held_out: HeldOut, rounds: int, clock: Callable[[], float]) -> None:
        self.network, self._held_out, self._rounds, self._clock = network, held_out, rounds, clock
        vocabulary = Vocabulary.of(network)
        if held_out.prompt is None:
            self._predictions = Predictions(network, held_out.calls, vocabulary)
        else:
            self._predictions = Continuations(network, held_out.calls, vocabulary, held_out.prompt)
        self._prompts = held_out.prompts(network)
        self._turn()  # kernels are chosen and memory grows in it
        self.turns = [self._turn() for _ in range(rounds)]
        """Of the model without a policy."""
        self.right = self._written()

    @property
    def conditions(self) -> dict[str, Any]:
        """Return the description of the held-out data."""
        rows, positions = self._prompts["input_ids"].shape
        return {
            "count": len(self._held_out.chats) or sum(len(call.kwargs["input_ids"]) for call in self._held_out.calls),
            "chats": bool(self._held_out.chats),
            "needles": bool(self._held_out.needles),
            "answer_tokens": self._predictions.tokens,
            "right": self.right,
            "batch": rows,
            "prompt": positions,
            "new_tokens": NEW_TOKENS,
            "rounds": self._rounds,
            "prefill_seconds": median(turn.prefill for turn in self.turns),
            "decode_seconds": median(turn.decode for turn in self.turns),
        }

    def policy(self, on: On) -> dict[str, Any]:
        """Return how far predictions move, the share of right answers, and the speed-up."""
        with on():
            kl, top1 = self._predictions.moved()
        with on():
            right = self._written()
        return {"kl": kl, "top1": top1, "right": right} | self._speedups(on)

    def _speedups(self, on: On) -> dict[str, float]:
        self._turn(on)
        pairs = [(self._turn(), self._turn(on)) for _ in range(self._rounds)]
        self.turns += [whole for whole, _ in pairs]
        return {
            "prefill_speedup": median(whole.prefill / ours.prefill for whole, ours in pairs),
            "decode_speedup": median(whole.decode / ours.decode for whole, ours in pairs),
        }

    def _written(self) -> float | None:
        """The share of chats or needle prompts that are answered as they should be; of text, which has no right continuation, nothing."""
        if self._held_out.chats:
            return ExactMatch().right(self.network, self._held_out.chats)
        if self._held_out.needles:
            return NeedleRecall(batch=len(self._prompts["input_ids"])).right(self.network, self._held_out.needles)
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


def rank(row: dict[str, Any], by_answers: bool) -> tuple[float, float]:
    """Return what puts the rows of policies in order, the best first: by the share of right answers where it decides, then by KL."""
    return (-row["right"] if by_answers else 0.0), row["kl"]


class SkipJudge(Judge):
    """Counts what policies that skip experts drop."""

    def policy(self, on: On) -> dict[str, Any]:
        """Return the same, and the share of dropped assignments."""
        vocabulary = Vocabulary.of(self.network)
        with on(), counting(self.network, vocabulary) as read:
            kl, top1 = self._predictions.moved()
        with on(), counting(self.network, vocabulary) as written:
            right = self._written()
        found = {"kl": kl, "top1": top1, "ratio": read.ratio(), "skipped": skipped(written), "right": right}
        return found | self._speedups(on)
