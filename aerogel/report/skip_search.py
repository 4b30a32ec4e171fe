"""The report of a search for an expert-skipping policy: every policy at several ratios of dropped assignments, in words and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from markupsafe import Markup

from aerogel.io.record.measures import SkippedExperts
from aerogel.report import phrases, policy_search
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, PANEL, WIDE, Figure
from aerogel.report.policy_search import Judged, JudgedRow, JudgedSearch, Part, answers_match, counted, judged_on, speed_conditions, speeds
from aerogel.report.skips import skip_map

TEMPLATE = "skip_search.html"
GLOSSARY = (
    (
        "Token-expert assignment",
        "A token and one of the experts that the router sends it to. A dropped assignment is not computed; the expert's weights stay.",
    ),
    *policy_search.GLOSSARY,
    (
        "Less",
        "The policy drops less than the target: it keeps the top expert of each token, or has few settings.",
    ),
)


class Row(JudgedRow):
    """A policy at a target ratio."""

    asked: float
    met: bool
    """True where it drops the target ratio."""
    ratio: float
    """Share of assignments that it drops of held-out chats, answers included, in one forward."""
    skipped: SkippedExperts


class MoeShape(Part):
    """The shape of the MoE layers."""

    layers: int
    experts: int
    top_k: int


class Search(JudgedSearch):
    """One search for an expert-skipping policy: the content of search.json."""

    budget: float
    moe: MoeShape
    rows: list[Row]
    """By policy, then by share."""

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
    judged: Judged
    best: bool
    chats: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        judged = self.judged
        kept = judged.right if self.chats else judged.top1
        return self.policy, self.asked, self.skipped, judged.kl, kept, judged.prefill, judged.decode


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
            Judged.of(row),
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
    said = f"{counted(len(met), len(policies))} drop as much."
    if best is None:
        return said
    kept = f"The most likely token is the same for {phrases.percent(best.top1)} of the tokens"
    if best.right is not None:
        kept += f", and {answers_match(found, best)}"
    return f"{said} {kept}. {speeds(best)}"


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
    judged, moe = f"{judged_on(found)}, {found.answer_tokens:,} tokens", found.moe
    return f"{moe.layers} layers of {moe.experts} experts, {moe.top_k} per token. Measured on {judged}. {speed_conditions(found)}"


def _nats(kl: float) -> str:
    return f"{phrases.digits(kl)} nats"
