"""The report of a search for experts to skip: every rule, its costs and speeds against the share it drops, and why others are left out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.report import search, skip_search
from aerogel.report.courses import Course, courses
from tests.report.test_page import read


def row(policy: str, asked: float, kl: float, **options: Any) -> dict[str, Any]:
    return {
        "policy": policy, "asked": asked, "met": True, "step": {policy: {}}, "ratio": asked + 0.01, "kl": kl, "top1": 0.98, "right": 0.6,
        "prefill_speedup": 1.6, "decode_speedup": 0.95, "seconds": 12.0,
        "skipped": {
            "prefill": 0.7,
            "decode": 0.2,
            "dropped_tokens": 0.1,
            "layers": [[0.25, 0.75], [0.5, 1.0]],
            "dropped_tokens_by_layer": [0.0, 0.2],
        },
    } | options  # fmt: skip


def record(**facts: Any) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    return {
        "schema": 1,
        "task": "skip",
        "budget": 0.67,
        "model": {"name": "a <b>mixture</b>", "family": "qwen3_vl_moe", "parameters": 1000, "dtype": "float32"},
        "provenance": {"date": "2026-11-23T06:12:00+00:00", "seed": 0, "versions": {"aerogel": "0.1.0"}},
        "timings": {"compress": 60.0},
        "moe": {"layers": 2, "experts": 16, "top_k": 4},
        "count": 64,
        "chats": True,
        "answer_tokens": 1088,
        "right": 0.61,
        "batch": 8,
        "prompt": 63,
        "new_tokens": 16,
        "rounds": 3,
        "prefill_seconds": 0.037,
        "decode_seconds": 0.00467,
        "rows": [
            row("modes", 0.5, 0.0001),
            row("modes", 0.67, 0.0005),
            row("reduced_topk", 0.5, 0.0002, met=False, ratio=0.444),
            row("reduced_topk", 0.67, 0.012),
            row("wild", 0.67, float("nan")),
        ],
        "left_out": [{"policy": "<b>odp</b>", "reason": "it drops 66.0% of all <i>pairs</i> at most"}],
    } | facts


def rendered(**facts: Any) -> Any:
    return read(search.page(record(**facts)))


def test_everything_is_said() -> None:
    words = rendered().words
    for said in (
        "Aerogel search for expert skipping · 2026-11-23",
        "a <b>mixture</b> skips 67 % of its token-expert assignments with modes; the KL divergence is 0.000500 nats per token.",
        "3 of 4 policies can drop as much. The most likely token is the same for 98.0 % of the tokens,",
        "and 60.0 % of the answers match exactly; of the original, 61.0 %.",
        "Prefill is 1.60 times faster, decoding 0.95 times.",
        "2 layers of 16 experts, 4 per token. Measured on 64 chats held out of calibration, 1,088 tokens.",
        "Speed at batch 8 with prompts of 63 tokens and 16 generated tokens, 3 rounds with and without each policy, alternating;",
        "0.037 s per prompt without and 4.67 ms per token.",
        "modes 50 % 51.0 % 0.000100 98.0 % 60.0 % 1.60 0.95 12 s",
        "reduced_topk 50 %, less 44.4 % 0.000200",
        "wild 67 % 68.0 % not a number",
        "<b>odp</b> it drops 66.0% of all <i>pairs</i> at most",
        "Assignments that modes drops",
        "Exact match ↑ better",
        "KL, nats per token ↓ better",
        "Decoding, times faster ↑ better",
        "compress 60 s",
    ):
        assert said in words, said
    assert "Images, layer 1: 100\u202f%" in search.page(record()), "of the map"
    told = search.told(record())
    assert told.columns == ("policy", "target", "skipped", "KL", "exact match", "prefill", "decode")
    assert [one.cells[:2] for one in told.rows][:3] == [
        ("modes", "50\u202f%"),
        ("reduced_topk", "50\u202f%, less"),
        ("modes", "67\u202f%"),
    ]
    assert [one.best for one in told.rows] == [False, False, True, False, False]


def test_nothing_is_fetched_and_all_is_escaped() -> None:
    html = search.page(record())
    assert not re.search(r"https?:|//\w|url\(|@import", html)
    assert not {"script", "link", "iframe", "object", "b", "i"} & set(read(html).seen)


def test_text_is_judged_by_what_stays_first() -> None:
    rows = [row("modes", 0.67, 0.0005, right=None)]
    words = rendered(rows=rows, chats=False, right=None).words
    assert "Same most likely token ↑ better" in words
    assert "match exactly" not in words
    assert "Measured on 64 sequences" in words
    assert "modes 67 % 68.0 % 0.000500 98.0 % 1.60" in words
    assert search.told(record(rows=rows, chats=False, right=None)).columns[4] == "same token"


def test_a_search_that_found_nothing_says_why() -> None:
    short = [row("reduced_topk", 0.67, 0.01, met=False)]
    words = rendered(rows=short).words
    assert "No policy drops 67 % of the token-expert assignments of a <b>mixture</b>." in words
    assert "0 of 2 policies can drop as much." in words
    assert "Assignments that" not in words
    empty = rendered(rows=[]).words
    assert "Quality" not in empty
    assert "it drops 66.0%" in empty


def test_curves_have_a_dot_for_each_share() -> None:
    drawn = str(skip_search.curves_chart(skip_search.Search.model_validate(record()), "KL", lambda row: row.kl, False, 956))
    assert drawn.count('class="this"') == 2
    assert drawn.count('class="other"') == 2, "what is no number is not drawn"
    assert drawn.count("path-best") == 1
    ends = re.findall(r"<title>(\w+): ([\d.]+) at the end", drawn)
    assert set(ends) == {("modes", "0.000500"), ("reduced_topk", "0.0120")}


def test_a_thin_line_leads_to_names_of_ends_further_left() -> None:
    def lines(end: float) -> int:
        drawn = [Course("a", [1.0, 2.0], at=[0.5, 0.9]), Course("b", [1.0, 3.0], at=[0.5, end])]
        return str(courses(drawn, "Times", log=False, rising=True)).count('class="grid"')

    assert lines(0.7) == lines(0.9) + 1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"task": "words"}, "search.json is of the search 'words', which this version does not know: cache, skip, tokens"),
        ({"budget": "much"}, "budget"),
        ({"rows": [row("modes", 0.5, 0.1, skipped={})]}, "skipped"),
    ],
)
def test_a_record_that_is_none_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        search.page(record(**facts))
