"""The report of a search for an expert-skipping policy: every policy at several ratios of dropped assignments, in words and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from aerogel.io.record.measures import SkippedExperts
from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.report import phrases
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, PANEL, WIDE, Figure
from aerogel.report.skips import skip_map

TEMPLATE = "skip_search.html"
GLOSSARY = (
    (
        "Token-expert assignment",
        "A token and one of the experts that the router sends it to. A dropped assignment is not computed; the expert's weights stay.",
    ),
    ("KL", "Divergence of the next-token probabilities from those of the original model on the tokens of the answers, in nats per token."),
    ("Same token", "Share of those tokens for which both have the same most likely token."),
    ("Exact match", "Share of chats whose answer is the expected one."),
    (
        "Prefill, decode",
        "Processing the prompt, all tokens at once; generating the answer, one token after another. Times faster with the policy.",
    ),
    (
        "Less",
        "The policy drops less than the target: it keeps the top expert of each token, or has few settings.",
    ),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Row(_Part):
    """A policy at a target ratio."""

    policy: str
    asked: float
    met: bool
    """True where it drops the target ratio."""
    ratio: float
    """Share of assignments that it drops of held-out chats, answers included, in one forward."""
    kl: float
    top1: float
    right: float | None = None
    prefill_speedup: float
    decode_speedup: float
    seconds: float | None = None
    """Of its calibration."""
    skipped: SkippedExperts


class LeftOut(_Part):
    """A policy that misses the budget, or refuses the network."""

    policy: str
    reason: str


class MoeShape(_Part):
    """The shape of the MoE layers."""

    layers: int
    experts: int
    top_k: int


class Search(_Part):
    """One search for an expert-skipping policy: the content of search.json."""

    model: ModelRecord
    budget: float
    moe: MoeShape
    count: int
    chats: bool
    answer_tokens: int
    right: float | None = None
    """Of the original model."""
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    prefill_seconds: float
    decode_seconds: float
    rows: list[Row]
    """By policy, then by share."""
    left_out: list[LeftOut] = []
    provenance: Provenance = Provenance()
    timings: dict[str, float] = {}

    @property
    def best(self) -> Row | None:
        """The policy of the lowest KL divergence among those that meet the budget."""
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
    return "policy", "target", "skipped", "KL", "exact match" if found.chats else "same token", "prefill", "decode"


def lines(found: Search) -> Iterator[Line]:
    """Every row in words: shares from small to large, in each the best first."""
    for row in sorted(found.rows, key=lambda row: (row.asked, not math.isfinite(row.kl), row.kl)):
        yield Line(
            row.policy,
            f"{phrases.percent(row.asked, 2)}{'' if row.met else ', less'}",
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
    """Say what was found, in one sentence."""
    best, share = found.best, phrases.percent(found.budget, 2)
    if best is None:
        return f"No policy drops {share} of the token-expert assignments of {found.model.name}."
    skips = f"{found.model.name} skips {share} of its token-expert assignments with {best.policy}"
    return f"{skips}; the KL divergence is {_nats(best.kl)} per token."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    best = found.best
    met = {row.policy for row in found.rows if row.asked == found.budget and row.met}
    policies = {row.policy for row in found.rows} | {one.policy for one in found.left_out}
    said = f"{len(met)} of {len(policies)} {'policy' if len(policies) == 1 else 'policies'} can drop as much."
    if best is None:
        return said
    kept = f"The most likely token is the same for {phrases.percent(best.top1)} of the tokens"
    if best.right is not None:
        kept += f", and {phrases.percent(best.right)} of the answers match exactly; of the original, {phrases.percent(found.right)}"
    read, written = best.prefill_speedup, best.decode_speedup
    return f"{said} {kept}. Prefill is {read:.2f} times faster, decoding {written:.2f} times."


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    best = found.best
    kept = "Exact match" if found.chats else "Same most likely token"
    return {
        "title": f"{found.model.name} · {phrases.percent(found.budget, 2)} of the assignments dropped",
        "conditions": _conditions(found),
        "chats": found.chats,
        "lines": list(lines(found)),
        "best": best,
        "kl": _figure(found, "KL, nats per token", lambda row: row.kl) if found.rows else None,
        "kept": _figure(found, kept, lambda row: row.right if found.chats else row.top1, rising=True) if found.rows else None,
        "speeds": [
            _figure(found, "Prefill, times faster", lambda row: row.prefill_speedup, rising=True, wide=PANEL),
            _figure(found, "Decoding, times faster", lambda row: row.decode_speedup, rising=True, wide=PANEL),
        ]
        if found.rows
        else [],
        "map": Figure(skip_map(best.skipped, WIDE), skip_map(best.skipped, NARROW)) if best else None,
    }


def _figure(found: Search, title: str, value: Callable[[Row], float | None], rising: bool = False, wide: float = WIDE) -> Figure:
    return Figure(curves_chart(found, title, value, rising, wide), curves_chart(found, title, value, rising, NARROW))


def curves_chart(found: Search, title: str, value: Callable[[Row], float | None], rising: bool, width: float) -> Markup:
    """Draw a line for each policy over the share of assignments that it drops."""
    drawn = []
    for name, rows in groupby(found.rows, lambda row: row.policy):
        points = [(row.ratio, number) for row in rows if (number := value(row)) is not None]
        drawn.append(
            Course(name, [y for _, y in points], best=found.best is not None and name == found.best.policy, at=[x for x, _ in points])
        )
    return courses(drawn, title, across="Share of assignments dropped", log=not rising, rising=rising, width=width)


def _conditions(found: Search) -> str:
    judged = f"{found.count:,} {'chats' if found.chats else 'sequences'} held out of calibration, {found.answer_tokens:,} tokens"
    moe = found.moe
    turns = f"{found.rounds} rounds with and without each policy, alternating"
    whole = f"{phrases.seconds(found.prefill_seconds)} per prompt without and {phrases.digits(1000 * found.decode_seconds)} ms per token"
    return (
        f"{moe.layers} layers of {moe.experts} experts, {moe.top_k} per token. Measured on {judged}. "
        f"Speed at batch {found.batch} with prompts of {found.prompt:,} tokens and {found.new_tokens} generated tokens, {turns}; {whole}."
    )


def _nats(kl: float) -> str:
    return f"{phrases.digits(kl)} nats"
