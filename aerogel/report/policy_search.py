"""Fields and words that reports of searches share: policies left out, and policies judged by their answers and their speed."""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.report import phrases

KL = ("KL", "Divergence of the next-token probabilities from those of the original model on the tokens of the answers, in nats per token.")
SAME_TOKEN = ("Same token", "Share of those tokens for which both have the same most likely token.")
EXACT_MATCH = ("Exact match", "Share of chats whose answer is the expected one.")
NUMBERS_FOUND = ("Numbers found", "Share of prompts with a hidden number whose reply has it in it.")
SPEED = (
    "Prefill, decode",
    "Processing the prompt, all tokens at once; generating the answer, one token after another. Times faster with the policy.",
)
GLOSSARY = (KL, SAME_TOKEN, EXACT_MATCH, SPEED)


class Part(BaseModel):
    """A part of a search's record."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class LeftOut(Part):
    """A policy that misses the budget, or refuses the network."""

    policy: str
    reason: str


class JudgedRow(Part):
    """A policy with what it costs and gains on held-out data."""

    policy: str
    kl: float
    top1: float
    right: float | None = None
    prefill_speedup: float
    decode_speedup: float
    seconds: float | None = None
    """Of its calibration."""


class JudgedSearch(Part):
    """A search whose policies are judged by answers and speed."""

    model: ModelRecord
    count: int
    answer_tokens: int
    chats: bool = False
    """True where the data is chats."""
    needles: bool = False
    """True where it is prompts with hidden numbers; otherwise it is text."""
    right: float | None = None
    """Of the original model."""
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    prefill_seconds: float
    decode_seconds: float
    left_out: list[LeftOut] = []
    provenance: Provenance = Provenance()
    timings: dict[str, float] = {}


class Judged(NamedTuple):
    """A judged row in words."""

    kl: str
    top1: str
    right: str
    prefill: str
    decode: str
    seconds: str

    @classmethod
    def of(cls, row: JudgedRow) -> Judged:
        """Put its figures into words."""
        return cls(
            phrases.digits(row.kl),
            phrases.percent(row.top1),
            phrases.percent(row.right),
            f"{row.prefill_speedup:.2f}",
            f"{row.decode_speedup:.2f}",
            phrases.NONE if row.seconds is None else phrases.seconds(row.seconds),
        )


def rank(found: JudgedSearch, row: JudgedRow) -> tuple[bool, float, float]:
    """Return what puts rows in order, the best first: by the numbers that are found where some were hidden, then by KL."""
    return not math.isfinite(row.kl), -(row.right or 0.0) if found.needles else 0.0, row.kl


def right_answers(found: JudgedSearch) -> str:
    """Return what the share of right answers is called."""
    return (NUMBERS_FOUND if found.needles else EXACT_MATCH)[0]


def judged_on(found: JudgedSearch) -> str:
    """Say what policies were judged on."""
    kind = "chats" if found.chats else "prompts with hidden numbers" if found.needles else "sequences of text"
    return f"{found.count:,} {kind} held out of calibration"


def answers_match(found: JudgedSearch, best: JudgedRow) -> str:
    """Say how many answers are right, with the best policy and without."""
    if found.needles:
        return f"{phrases.percent(best.right)} of the hidden numbers are found; by the original, {phrases.percent(found.right)}"
    return f"{phrases.percent(best.right)} of the answers match exactly; of the original, {phrases.percent(found.right)}"


def speeds(best: JudgedRow) -> str:
    """Say how much faster the best policy is."""
    return f"Prefill is {best.prefill_speedup:.2f} times faster, decoding {best.decode_speedup:.2f} times."


def counted(number: int, all_policies: int) -> str:
    """Say how many policies of how many."""
    return f"{number} of {all_policies} {'policy' if all_policies == 1 else 'policies'} can"


def speed_conditions(found: JudgedSearch) -> str:
    """Say how speed was measured."""
    turns = f"{found.rounds} rounds with and without each policy, alternating"
    whole = f"{phrases.seconds(found.prefill_seconds)} per prompt without and {phrases.digits(1000 * found.decode_seconds)} ms per token"
    return (
        f"Speed at batch {found.batch} with prompts of {found.prompt:,} tokens and {found.new_tokens} generated tokens, {turns}; {whole}."
    )
