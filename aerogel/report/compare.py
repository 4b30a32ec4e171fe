"""Before and after: every measured number of both networks on one line, and how it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from aerogel.report import phrases
from aerogel.report.record import Side

Number = float | None


class Row(NamedTuple):
    """One line of the comparison, ready to print."""

    name: str
    before: str
    after: str
    change: str


class _Compared(NamedTuple):
    name: str
    measure: str
    field: str
    show: Callable[[Number], str]
    compare: Callable[[Number, Number], str]


def value(side: Side, measure: str, field: str) -> Number:
    """One number of a side, or None when it was not measured."""
    found = getattr(side, measure)
    return None if found is None else getattr(found, field)


def rows(before: Side, after: Side) -> Iterator[Row]:
    """The lines for which the compressed side was measured."""
    for line in _COMPARED:
        theirs, ours = (value(side, line.measure, line.field) for side in (before, after))
        if ours is not None:
            yield Row(line.name, line.show(theirs), line.show(ours), line.compare(theirs, ours))
    for task, scores in after.lm_eval.items():
        for metric, score in scores.items():
            score_before = before.lm_eval.get(task, {}).get(metric)
            yield Row(f"{task}, {metric}", phrases.digits(score_before), phrases.digits(score), phrases.change(score_before, score))


def _smaller(before: Number, after: Number) -> str:
    return phrases.versus(before, after, "smaller", "larger")


def _faster(before: Number, after: Number) -> str:
    return phrases.versus(after, before, "faster", "slower")


def _nothing(before: Number, after: Number) -> str:
    return ""


def _four(number: Number) -> str:
    return phrases.digits(number, 4)


_COMPARED = (
    _Compared("Weights on disk", "size", "bytes", phrases.size, _smaller),
    _Compared("Bits per weight", "size", "bits_per_weight", phrases.digits, _nothing),
    _Compared("Perplexity", "perplexity", "perplexity", _four, phrases.change),
    _Compared("KL from the original, nats per token", "agreement", "kl", phrases.digits, _nothing),
    _Compared("Same next token", "agreement", "top1", phrases.percent, _nothing),
    _Compared("Decode, tokens per second", "speed", "decode_tokens_per_second", phrases.digits, _faster),
    _Compared("Prefill, tokens per second", "speed", "prefill_tokens_per_second", phrases.digits, _faster),
    _Compared("Peak memory while running", "speed", "peak_memory_bytes", phrases.size, _smaller),
)
