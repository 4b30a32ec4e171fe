"""Fields, words and figures that reports of searches share whose candidates are compressed copies of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from markupsafe import Markup
from pydantic import Field

from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.report import phrases
from aerogel.report.policy_search import KL, SAME_TOKEN, LeftOut, Part
from aerogel.report.svg import element, image, label

GLOSSARY = (
    KL,
    SAME_TOKEN,
    ("Perplexity", "The exponential of the mean negative log-likelihood per token of the held-out data. Lower is better."),
    ("Error", "Squared norm of what the output moves by, divided by the squared norm of the original's output, on held-out inputs."),
    ("Same class", "Share of held-out samples for which both have the same most likely class."),
)
_PITCH, _ROOM = 22.0, 500.0


class CopyRow(Part):
    """A candidate with what it costs."""

    name: str
    steps: list[dict[str, Any]]
    met: bool = True
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    error: float | None = None
    seconds: float | None = None


class CopySearch(Part):
    """A search whose candidates are judged by predictions or outputs of copies on held-out data."""

    model: ModelRecord
    budget: str
    figure: Literal["kl", "error"]
    """Field of the rows that they are ranked by."""
    judged: Literal["predictions", "classes", "outputs"]
    count: int
    """Sequences, images or samples that candidates were judged on."""
    tokens: int | None = None
    calls: int | None = None
    perplexity: float | None = None
    """Of the original model."""
    left_out: list[LeftOut] = Field(default_factory=list)
    provenance: Provenance = Provenance()
    timings: dict[str, float] = Field(default_factory=dict)


def moved(found: CopySearch, row: CopyRow) -> float:
    """Return how far a candidate moves the model."""
    value = row.kl if found.figure == "kl" else row.error
    return math.inf if value is None else value


def headings(found: CopySearch) -> tuple[str, ...]:
    """Return the headings of what the judge measured."""
    return {"predictions": ("KL", "same token", "perplexity"), "classes": ("error", "same class"), "outputs": ("error",)}[found.judged]


def figures(found: CopySearch, row: CopyRow) -> tuple[str, ...]:
    """Return what the judge measured of a candidate, under these headings."""
    by_heading = {
        "KL": phrases.digits(row.kl),
        "same token": phrases.percent(row.top1),
        "same class": phrases.percent(row.top1),
        "perplexity": phrases.digits(row.perplexity),
        "error": phrases.percent(row.error),
    }
    return tuple(by_heading[each] for each in headings(found))


def cost(found: CopySearch, row: CopyRow) -> str:
    """Say how far a candidate moves the model."""
    if found.figure == "kl":
        return f"the KL divergence is {phrases.digits(row.kl)} nats per token"
    return f"the relative error of its output is {phrases.percent(row.error)}"


def beside(found: CopySearch, best: CopyRow) -> str:
    """Say what else moved: perplexity, or the most likely classes; nothing where neither was measured."""
    if best.perplexity is not None:
        return f" Perplexity goes from {phrases.digits(found.perplexity)} to {phrases.digits(best.perplexity)}."
    return f" The most likely class is the same for {phrases.percent(best.top1)} of the samples." if best.top1 is not None else ""


def judged_on(found: CopySearch) -> str:
    """Say what candidates were judged on."""
    if found.judged == "predictions":
        return f"{found.count:,} sequences held out of calibration, {found.tokens or 0:,} tokens"
    if found.judged == "outputs":
        return f"{found.calls or 0:,} calls held out of calibration, {found.count:,} samples"
    return f"{found.count:,} samples held out of calibration"


def ranking(found: CopySearch, rows: Sequence[CopyRow], best: CopyRow | None, width: float) -> Markup:
    """Draw a bar for each candidate, as long as it moves the model; where there is little room, names stand above their bars."""
    longest, above = max(moved(found, row) for row in rows) or 1.0, width < _ROOM
    left = 0.0 if above else 12 + 6.9 * max(len(row.name) for row in rows)
    pitch, down = (2 * _PITCH - 6, _PITCH - 5) if above else (_PITCH, 0.0)
    scale = (width - left - 70) / longest
    drawn = []
    for number, row in enumerate(rows):
        y, far = number * pitch, moved(found, row)
        style = "strong" if row is best else "small"
        words = phrases.digits(far) if found.figure == "kl" else phrases.percent(far)
        long, told = max(1.0, far * scale), element("title", f"{row.name}: {words}")
        drawn += [
            label(max(left - 10, 0), y + 15, row.name, style, "start" if above else "end"),
            element("rect", told, x=left, y=y + down + 5, width=long, height=12, rx=2, class_=_shade(row, row is best)),
            label(left + long + 7, y + down + 15, words, style),
        ]
    return image(width, len(rows) * pitch + 4, "Cost of every recipe", *drawn)


def _shade(row: CopyRow, best: bool) -> str:
    return "part-1" if best else "part-2" if row.met else "part-4"
