"""What the command line prints about coverage: counts by format, the names of layers that are not quantized, each place once."""

from __future__ import annotations

import sys

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from aerogel.cli.terminal import downloads, print_coverage
from tests.report.runs import coverage


def test_coverage_is_printed_by_format_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_coverage(coverage())
    assert capsys.readouterr().out.splitlines() == [
        "weights of 10 layers: 5 in int4, 5 not quantized",
        "  not quantized: conv_in, conv_out, up_blocks.*.resnets.*.conv_shortcut (3 of them)",
        "inputs of 10 layers: 4 in int8, one range a step, 6 not quantized",
        "  not quantized: mid_block.<b>conv</b>",
        "attention operands quantized in 2 attention modules",
    ]


def test_names_are_not_listed_where_nothing_is_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    print_coverage(
        {"layers": 2, "weights": {}, "inputs": {}, "unquantized_weights": ["a", "b"], "unquantized_inputs": ["a", "b"], "attentions": []}
    )
    assert capsys.readouterr().out.splitlines() == ["weights of 2 layers: 2 not quantized", "inputs of 2 layers: 2 not quantized"]


@pytest.mark.parametrize(("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)])
def test_downloads_have_progress_bars_on_a_terminal(terminal: bool, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with downloads(quiet):
        assert are_progress_bars_disabled() is not shown
