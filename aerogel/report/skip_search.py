"""What a search for a rule that skips experts found, in words and figures: every policy at several shares of dropped pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from aerogel.report import phrases
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, PANEL, WIDE, Figure
from aerogel.report.record import Model, Skipped
from aerogel.report.skips import skip_map

TEMPLATE = "skip_search.html"
GLOSSARY = (
    ("Pair", "A token and an expert that the router sends it to. A pair that is dropped is not computed; the expert's weights stay."),
    ("KL", "How far the next-token probabilities are from those of the whole mixture where answers are predicted, in nats a token."),
    ("As before", "Share of those tokens for which both rank the same one first."),
    ("Right", "Share of chats that are replied to word for word as they should be."),
    (
        "Prefill, decode",
        "Reading a prompt, all tokens at once; writing an answer, one token after another. Times faster with the rule.",
    ),
    (
        "Short",
        "A rule that keeps each token's best expert, or has few steps, cannot drop just as much: it stands where it ends.",
    ),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Row(_Part):
    """A policy at a share."""

    policy: str
    asked: float
    met: bool
    """Whether it drops what was asked for."""
    ratio: float
    """What it drops of the held-out pairs, replies read and not written."""
    kl: float
    top1: float
    right: float | None = None
    prefill_speedup: float
    decode_speedup: float
    seconds: float | None = None
    """To make it."""
    skipped: Skipped


class LeftOut(_Part):
    """A policy that misses the budget, or refuses the network."""

    policy: str
    reason: str


class Mixture(_Part):
    """What is routed."""

    layers: int
    experts: int
    top_k: int


class Search(_Part):
    """One search for a rule: the content of search.json."""

    model: Model
    budget: float
    mixture: Mixture
    count: int
    chats: bool
    answer_tokens: int
    right: float | None = None
    """Of the whole mixture."""
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    prefill_seconds: float
    decode_seconds: float
    rows: list[Row]
    """By policy, then by share."""
    left_out: list[LeftOut] = []
    provenance: dict[str, Any] = {}
    timings: dict[str, float] = {}

    @property
    def best(self) -> Row | None:
        """The rule that moves predictions least among those that meet the budget."""
        enough = [row for row in self.rows if row.asked == self.budget and row.met and math.isfinite(row.kl)]
        return min(enough, key=lambda row: row.kl, default=None)


class Line(NamedTuple):
    """A row in words."""

    policy: str
    asked: str
    skipped: str
    kl: str
    top1: str
    right: str
    prefill: str
    decode: str
    seconds: str
    best: bool
    chats: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        kept = self.right if self.chats else self.top1
        return self.policy, self.asked, self.skipped, self.kl, kept, self.prefill, self.decode


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "policy", "asked for", "skipped", "KL", "right" if found.chats else "as before", "prefill", "decode"


def lines(found: Search) -> Iterator[Line]:
    """Every row in words: shares from small to large, in each the best first."""
    for row in sorted(found.rows, key=lambda row: (row.asked, not math.isfinite(row.kl), row.kl)):
        yield Line(
            row.policy,
            f"{phrases.percent(row.asked, 2)}{'' if row.met else ', short'}",
            phrases.percent(row.ratio),
            phrases.digits(row.kl),
            phrases.percent(row.top1),
            phrases.percent(row.right),
            f"{row.prefill_speedup:.2f}",
            f"{row.decode_speedup:.2f}",
            phrases.NONE if row.seconds is None else phrases.seconds(row.seconds),
            row is found.best,
            found.chats,
        )


def headline(found: Search) -> str:
    """What was found, in one sentence."""
    best, share = found.best, phrases.percent(found.budget, 2)
    if best is None:
        return f"No rule drops {share} of the expert calls of {found.model.name}."
    return f"{found.model.name} does without {share} of its expert calls with {best.policy}; its predictions move by {_nats(best.kl)}."


def lead(found: Search) -> str:
    """What stands beside it."""
    best = found.best
    met = {row.policy for row in found.rows if row.asked == found.budget and row.met}
    policies = {row.policy for row in found.rows} | {one.policy for one in found.left_out}
    said = f"{len(met)} of {len(policies)} {'rule drops' if len(policies) == 1 else 'rules drop'} so much."
    if best is None:
        return said
    kept = f"The same token stays first at {phrases.percent(best.top1)} of all places"
    if best.right is not None:
        kept += f", and {phrases.percent(best.right)} of the replies are right; the whole mixture's, {phrases.percent(found.right)}"
    read, written = best.prefill_speedup, best.decode_speedup
    return f"{said} {kept}. Prompts are read {read:.2f} times as fast and replies written {written:.2f} times as fast."


def context(found: Search) -> dict[str, Any]:
    """What the template shows beside what all searches have."""
    best = found.best
    kept = "Replies right" if found.chats else "Same token first"
    return {
        "title": f"{found.model.name} · {phrases.percent(found.budget, 2)} of the experts skipped",
        "conditions": _conditions(found),
        "chats": found.chats,
        "lines": list(lines(found)),
        "best": best,
        "kl": _figure(found, "KL, nats a token", lambda row: row.kl) if found.rows else None,
        "kept": _figure(found, kept, lambda row: row.right if found.chats else row.top1, rising=True) if found.rows else None,
        "speeds": [
            _figure(found, "Prompts, times faster", lambda row: row.prefill_speedup, rising=True, wide=PANEL),
            _figure(found, "Written tokens, times faster", lambda row: row.decode_speedup, rising=True, wide=PANEL),
        ]
        if found.rows
        else [],
        "map": Figure(skip_map(best.skipped, WIDE), skip_map(best.skipped, NARROW)) if best else None,
    }


def _figure(found: Search, title: str, value: Callable[[Row], float | None], rising: bool = False, wide: float = WIDE) -> Figure:
    return Figure(curves_chart(found, title, value, rising, wide), curves_chart(found, title, value, rising, NARROW))


def curves_chart(found: Search, title: str, value: Callable[[Row], float | None], rising: bool, width: float) -> Markup:
    """A line for each policy over the share of pairs that it drops."""
    drawn = []
    for name, rows in groupby(found.rows, lambda row: row.policy):
        points = [(row.ratio, number) for row in rows if (number := value(row)) is not None]
        drawn.append(
            Course(name, [y for _, y in points], best=found.best is not None and name == found.best.policy, at=[x for x, _ in points])
        )
    return courses(drawn, title, across="Share of pairs skipped", log=not rising, rising=rising, width=width)


def _conditions(found: Search) -> str:
    judged = f"{found.count:,} {'chats' if found.chats else 'sequences'} that no rule was calibrated on, {found.answer_tokens:,} tokens"
    mixture = found.mixture
    turns = f"{found.rounds} rounds with and without each rule in turns"
    whole = f"{phrases.seconds(found.prefill_seconds)} a prompt without and {phrases.digits(1000 * found.decode_seconds)} ms a token"
    return (
        f"{mixture.layers} layers of {mixture.experts} experts, {mixture.top_k} a token. Judged on {judged}. Speed is of {found.batch} "
        f"prompts of {found.prompt:,} tokens at once and {found.new_tokens} tokens behind each, {turns}; {whole}."
    )


def _nats(kl: float) -> str:
    return f"{phrases.digits(kl)} nats"
