"""The report of a search for zeros: what it says in words, the zeros of the best recipe, and records that are not as they should be."""

from __future__ import annotations

from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.report import search
from tests.report.test_page import read

LAYERS = {f"model.layers.{number}.{kind}": 100 * (number + 1) for number in range(2) for kind in ("q", "up")}


def row(name: str, kl: float, **options: Any) -> dict[str, Any]:
    return {
        "name": name, "stage": "criteria", "steps": [{name: {}}], "zeros": 0.5, "met": True, "kl": kl, "top1": 0.75, "perplexity": 39.1,
        "seconds": 120.0, "layers": dict.fromkeys(LAYERS, 0.5),
    } | options  # fmt: skip


def record(**facts: Any) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    return {
        "schema": 3,
        "task": "sparsity",
        "budget": "50%",
        "share": 0.5,
        "pattern": "unstructured",
        "figure": "kl",
        "judged": "predictions",
        "count": 32,
        "tokens": 16352,
        "perplexity": 24.4,
        "model": {"name": "a <b>model</b>", "family": "llama", "parameters": 1000, "dtype": "float32"},
        "provenance": {"date": "2026-11-23T06:12:00+00:00", "seed": 0, "versions": {"aerogel": "0.1.0"}},
        "timings": {"compress": 60.0},
        "layers": {name: {"block": name.rpartition(".")[0], "weights": size} for name, size in LAYERS.items()},
        "stages": [{"name": "criteria", "about": "every criterion, the same share in each layer", "tried": ["sparsegpt", "wanda"]}],
        "rows": [row("sparsegpt", 0.47), row("wanda", 0.79), row("erk + wanda", 0.5, zeros=0.4, met=False)],
        "left_out": [{"policy": "<b>fcpts</b>", "reason": "it trains, which takes <i>long</i>"}],
    } | facts


def test_the_report_says_what_was_found() -> None:
    text = read(search.page(record())).words
    for words in (
        "Aerogel search for sparsity · 2026-11-23",
        "a <b>model</b> loses 50.0 % of its prunable weights with sparsegpt; the KL divergence is 0.470 nats per token.",
        "2 of 3 recipes meet the budget. Perplexity goes from 24.4 to 39.1.",
        "Pruned are 4 layers with 600 weights of 1.00 k parameters. Judged on 32 sequences held out of calibration, 16,352 tokens.",
        "Achieved by sparsegpt.",
        "Criteria every criterion, the same share in each layer",
        "sparsegpt criteria 50.0 % 0.470 75.0 % 39.1 2 min",
        "erk + wanda criteria 40.0 %, less 0.500",
        "<b>fcpts</b> it trains, which takes <i>long</i>",
    ):
        assert words in text, words


def test_the_terminal_has_the_same_rows() -> None:
    told = search.told(record())
    assert told.columns == ("recipe", "zeros", "KL", "same token", "perplexity")
    assert [(line.cells[0], line.best) for line in told.rows] == [("sparsegpt", True), ("wanda", False), ("erk + wanda", False)]


def test_a_search_by_outputs_and_one_that_finds_nothing() -> None:
    outputs = {"figure": "error", "judged": "outputs", "count": 64, "tokens": None, "perplexity": None, "calls": 8, "pattern": "2:4"}
    found = record(**outputs, rows=[row("magnitude", None, error=0.0123, top1=None, perplexity=None)])
    text = read(search.page(found)).words
    assert "loses 50.0 % in the pattern 2:4 of its prunable weights with magnitude; the relative error of its output is 1.23 %." in text
    assert "Judged on 8 calls held out of calibration, 64 samples." in text
    nothing = read(search.page(record(rows=[row("erk + wanda", 0.5, met=False)]))).words
    assert "No recipe prunes 50.0 % of the weights of a <b>model</b>." in nothing
    assert "Zeros of each layer" not in nothing


def test_a_record_that_is_not_as_it_should_be_is_named() -> None:
    with pytest.raises(AerogelError, match=r"figure"):
        search.page(record(figure="speed"))
