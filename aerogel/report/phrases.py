"""Numbers and comparisons in words: the same value reads the same everywhere in a report."""

from __future__ import annotations

import math

from aerogel.io.record.measures import Sample, Side
from aerogel.io.record.schema import Record

SPACE = "\u202f"
"""Narrow space between a number and its unit; a line never breaks there."""
NONE = "–"


def size(count: float | None) -> str:
    """Bytes with three digits and a decimal unit."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{digits(count)}{SPACE}{unit}"
        count /= 1000
    return NONE


def number(count: float | None) -> str:
    """A count with three digits and the suffix that readers of model cards expect."""
    if count is None:
        return NONE
    for suffix in ("", "k", "M", "B"):
        if abs(count) < 999.5 or suffix == "B":
            return f"{digits(count)}{SPACE}{suffix}".strip()
        count /= 1000
    return NONE


def digits(value: float | None, significant: int = 3) -> str:
    """A number with so many significant digits and no exponent."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value == 0:
        return "0"
    power = int(f"{value:.{significant - 1}e}".partition("e")[2])  # of the rounded value: 9.996 is 10.0
    return f"{value:,.{max(0, significant - 1 - power)}f}"


def percent(share: float | None, significant: int = 3) -> str:
    """A share of one as per cent."""
    return NONE if share is None else f"{digits(100 * share, significant)}{SPACE}%"


def near_one(value: float | None) -> str:
    """A cosine with as many digits as tell it from 1, at most six."""
    if value is None or value >= 1:
        return NONE if value is None else "1"
    decimals = 1 - math.floor(math.log10(1 - value))
    return f"{value:.{min(max(decimals, 3), 6)}f}"


def several(name: str, count: int) -> str:
    """Return a name and the number of things it stands for."""
    return f"{name} ({count} of them)" if count > 1 else name


def change(before: float | None, after: float | None) -> str:
    """Return the change of a value in per cent of what it was."""
    if not before or after is None or not math.isfinite(before) or not math.isfinite(after):
        return NONE
    share = after / before - 1
    return f"{'+' if share > 0 else '−' if share < 0 else ''}{percent(abs(share), 2)}"


def times(larger: float | None, smaller: float | None) -> str:
    """A ratio."""
    return NONE if not larger or not smaller else f"{digits(larger / smaller, 2 if larger / smaller < 10 else 3)}×"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 90:
        return f"{digits(value, 2)}{SPACE}s"
    return f"{value / 60:.0f}{SPACE}min" if value < 5400 else f"{value / 3600:.1f}{SPACE}h"


def same_tokens(sample: Sample) -> str:
    """Say how long two continuations of a prompt stay together; empty where that was not counted."""
    if sample.same is None or sample.tokens is None:
        return ""
    return f"the first {sample.same} of {sample.tokens} tokens are the same" if sample.same < sample.tokens else "identical"


def headline(run: Record) -> str:
    """Say how much smaller and faster the model is, and at what cost in quality, in one sentence."""
    gains = _gains(run)
    won = f"{run.model.name} {' and '.join(gains)}" if gains else f"{run.model.name} was compressed with {run.label}"
    return f"{won}; {_cost(run)}."


def versus(larger: float | None, smaller: float | None, yes: str, no: str) -> str:
    """`2.0× yes` when the first value is the larger one, else how many times `no`; per cent where the two are close."""
    if not larger or not smaller:
        return NONE
    word, (more, less) = (yes, (larger, smaller)) if larger >= smaller else (no, (smaller, larger))
    if more / less < 1.005:
        return "the same"
    return f"{percent(more / less - 1, 2)} {word}" if more / less < 1.1 else f"{times(more, less)} {word}"


def _gains(run: Record) -> list[str]:
    size_before, size_after = (side.size.bytes if side.size else None for side in (run.metrics.original, run.metrics.compressed))
    speed_before, speed_after = (_rate(side) for side in (run.metrics.original, run.metrics.compressed))
    clauses = [versus(size_before, size_after, "smaller", "larger"), versus(speed_after, speed_before, "faster", "slower")]
    compared = [clause for clause in clauses if clause not in (NONE, "the same")]
    gains = [f"is {' and '.join(compared)}"] if compared else []
    exact_match = run.metrics.compressed.exact_match
    if exact_match and exact_match.skipped:
        gains.append(f"skips {percent(exact_match.skipped.prefill)} of its token-expert assignments in prefill")
    return gains


def _rate(side: Side) -> float | None:
    """Tokens a second, or images a minute."""
    return side.speed.decode_tokens_per_second if side.speed else side.sampling.images_per_minute if side.sampling else None


def _cost(run: Record) -> str:
    answered = [side.exact_match for side in (run.metrics.original, run.metrics.compressed)]
    if answered[0] and answered[1]:  # asked for by name, so it is what somebody wants to know
        return f"{percent(answered[1].right)} of its answers match exactly, {percent(answered[0].right)} of the original's"
    before, after = run.metrics.original.perplexity, run.metrics.compressed.perplexity
    if before and after:
        verb = "rises" if after.perplexity > before.perplexity else "falls"
        step = change(before.perplexity, after.perplexity).lstrip("+−")
        ends = f"from {digits(before.perplexity)} to {digits(after.perplexity)}"
        if step == NONE:
            return f"its perplexity goes {ends}"
        return f"its perplexity {verb} by {step}, {ends}" if after.perplexity != before.perplexity else "its perplexity stays the same"
    frechet = next((name for name in run.metrics.compressed.of_features if name.startswith("frechet[")), None)
    if frechet:
        ours, theirs = (side.of_features.get(frechet) for side in (run.metrics.compressed, run.metrics.original))
        return f"its Fréchet distance [{frechet.partition('[')[2]} is {digits(ours)}, the original's {digits(theirs)}"
    images = run.metrics.compressed.image_similarity
    if images and images.ssim is not None:
        return f"its images have an SSIM of {digits(images.ssim)} with the original's"
    kl_divergence = run.metrics.compressed.kl_divergence
    if kl_divergence:
        return f"its most likely next token is the original's for {percent(kl_divergence.top1)} of the tokens"
    return "its quality was not measured"
