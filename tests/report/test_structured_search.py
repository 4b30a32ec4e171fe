"""The report of a search for parts that can leave: what it says in words, and records that are not as they should be."""

from __future__ import annotations

from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.report import search
from tests.report.test_page import read


def row(name: str, kl: float | None, step: dict[str, Any], speedup: float = 1.31, **options: Any) -> dict[str, Any]:
    tried = [{"parameters": 0.7, "speedup": 1.6}, {"parameters": 0.9, "speedup": speedup}]
    return {
        "name": name, "steps": [{name: step}], "speedup": speedup, "parameters": 0.9, "tried": tried, "kl": kl, "top1": 0.75,
        "perplexity": 39.1, "seconds": 120.0,
    } | options  # fmt: skip


def record(**facts: Any) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    return {
        "schema": 3,
        "task": "structured",
        "budget": "1.3x",
        "figure": "kl",
        "judged": "predictions",
        "count": 32,
        "tokens": 16352,
        "perplexity": 24.4,
        "rounds": 3,
        "forward_seconds": 0.25,
        "model": {"name": "a <b>model</b>", "family": "llama", "parameters": 1000, "dtype": "float32"},
        "provenance": {"date": "2026-11-23T06:12:00+00:00", "seed": 0, "versions": {"aerogel": "0.1.0"}},
        "timings": {"compress": 60.0},
        "rows": [row("shortgpt", 0.47, {"share": None, "count": 3}), row("prune_ffn_channels", 0.79, {"share": 0.25}, 1.3)],
        "left_out": [{"policy": "<b>prune_attention_heads</b>", "reason": "a forward is <i>1.1</i> times as fast"}],
    } | facts


def test_the_report_says_what_was_found() -> None:
    text = read(search.page(record())).words
    for words in (
        "Aerogel search for structured pruning · 2026-11-23",
        "A forward of a <b>model</b> is 1.31 times as fast with shortgpt; the KL divergence is 0.470 nats per token.",
        "2 of 3 methods can make it 1.3 times as fast, or miss that by at most 2 %.",
        "90.0 % of the parameters stay. Perplexity goes from 24.4 to 39.1.",
        "Speed: 3 rounds in turns with the original; 0.25 s for the original. Judged on 32 sequences held out of calibration",
        "shortgpt 3 layers 1.31x 90.0 % 0.470 75.0 % 39.1 2 min",
        "prune_ffn_channels 25.0 % 1.30x 90.0 % 0.790",
        "<b>prune_attention_heads</b> a forward is <i>1.1</i> times as fast",
        "Share of the parameters that left",
    ):
        assert words in text, words


def test_a_search_without_a_method_that_is_fast_enough() -> None:
    text = read(search.page(record(rows=[]))).words
    assert "No structured method makes a forward of a <b>model</b> about 1.3 times as fast." in text
    assert "0 of 1 method can make it 1.3 times as fast, or" in text


def test_a_method_that_is_not_fast_enough_when_timed_again_is_not_the_best() -> None:
    slow = row("shortgpt", 0.4, {"count": 3}, speedup=1.2, met=False)
    text = read(search.page(record(rows=[row("prune_ffn_channels", 0.79, {"share": 0.25}), slow]))).words
    assert "is 1.31 times as fast with prune_ffn_channels" in text
    assert "1 of 3 methods" in text
    assert "shortgpt 3 layers 1.20x, less" in text
    assert "No structured method" in read(search.page(record(rows=[slow]))).words


def test_outputs_are_told_by_their_error() -> None:
    rows = [row("prune_conv_filters", None, {"share": 0.25}, top1=None, perplexity=None, error=0.031)]
    text = read(search.page(record(judged="outputs", figure="error", calls=8, rows=rows))).words
    assert "the relative error of its output is 3.10 %." in text
    assert "Judged on 8 calls held out of calibration, 32 samples." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [row("shortgpt", 0.4, {"count": 3}, speedup="fast")]}, "rows"),  # type: ignore[arg-type]
        ({"figure": "taste"}, "figure"),
        ({"rows": [row("shortgpt", 0.4, {}, steps=[])]}, "steps"),
        ({"rows": [row("shortgpt", 0.4, {}, steps=[{"other": {}}])]}, "steps"),
    ],
)
def test_a_damaged_record_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        search.page(record(**change))
