"""The report of a search for rules that drop tokens: every rule at one budget, and why others are left out."""

from __future__ import annotations

from typing import Any

from aerogel.report import search
from tests.report import test_skip_search
from tests.report.test_page import read


def row(policy: str, kl: float, **options: Any) -> dict[str, Any]:
    return {
        "policy": policy, "step": {policy: {}}, "kept": 0.26, "kl": kl, "top1": 0.98, "right": 0.6, "prefill_speedup": 2.04,
        "decode_speedup": 1.1, "seconds": 12.0,
    } | options  # fmt: skip


def record(**facts: Any) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    shared = {key: value for key, value in test_skip_search.record().items() if key not in ("moe", "rows")}
    rows = [row("divprune", 0.02), row("fastv", 0.001, prefill_speedup=2.5), row("wild", float("nan"), seconds=None)]
    picture = {"question": "What is <b>there</b>?", "png": "aGk=", "rows": 2, "columns": 3, "kept": [0, 4]}
    return shared | {"task": "tokens", "budget": "2x", "rows": rows, "pictures": [picture]} | facts


def test_everything_is_said() -> None:
    page = search.page(record())
    words = read(page).words
    for said in (
        "a <b>mixture</b> meets 2x of prefill speed with fastv; the KL divergence is 0.00100 nats per token.",
        "3 of 4 policies can. 60.0 % of the answers match exactly; of the original, 61.0 %. Prefill is 2.50 times faster, decoding 1.10",
        "Measured on 64 chats held out of calibration, 1,088 tokens of answers. Speed at batch 8 with prompts of 63 tokens and 16",
        "fastv 26.0 % 0.00100 98.0 % 60.0 % 2.50 1.10 12 s",
        "wild 26.0 % not a number",
        "<b>odp</b> it drops 66.0% of all <i>pairs</i> at most",
        "What is <b>there</b>?",
    ):
        assert said in words, said
    assert page.count('class="gone"') == 4
    told = search.told(record())
    assert told.columns == ("policy", "computed", "KL", "exact match", "prefill", "decode")
    assert [(one.cells[0], one.best) for one in told.rows] == [("fastv", True), ("divprune", False), ("wild", False)]


def test_numbers_that_are_found_come_first() -> None:
    rows = [row("divprune", 0.02, right=0.9), row("fastv", 0.001, right=0.5), row("wild", float("nan"), right=1.0)]
    facts = record(rows=rows, pictures=[], chats=False, needles=True)
    words = read(search.page(facts)).words
    for said in (
        "meets 2x of prefill speed with divprune",
        "90.0 % of the hidden numbers are found; by the original, 61.0 %.",
        "Measured on 64 prompts with hidden numbers held out of calibration",
        "Numbers found",
    ):
        assert said in words, said
    told = search.told(facts)
    assert told.columns[3] == "numbers found"
    assert [one.cells[0] for one in told.rows] == ["divprune", "fastv", "wild"]
    text = read(search.page(record(rows=[row("fastv", 0.001, right=None)], pictures=[], chats=False))).words
    assert "Measured on 64 sequences of text held out of calibration" in text
    assert "answers match" not in text


def test_a_search_that_found_nothing_says_so() -> None:
    words = read(search.page(record(rows=[], pictures=[], budget="25%"))).words
    assert "No policy that drops tokens meets a share of 25% of the tokens with a <b>mixture</b>." in words
    assert "0 of 1 policy can." in words
