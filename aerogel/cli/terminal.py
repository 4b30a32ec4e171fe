"""Terminal output: the progress bar, the comparison of two models, a plan, a search."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aerogel.engine.planning import Kept, Plan
from aerogel.engine.progress import ProgressEstimator, Tell, bar
from aerogel.io import hub
from aerogel.io.record.measures import Metrics, Side
from aerogel.io.record.schema import Coverage, PolicyRecord, pattern
from aerogel.report import compare, coverage, phrases, reuse, search


@contextmanager
def progress(quiet: bool) -> Iterator[Tell]:
    """Show one progress bar for the whole run on standard error, or nothing when quiet."""
    if quiet:
        yield lambda event: None
        return
    with bar(Console(stderr=True), ProgressEstimator()) as tell:
        yield tell


@contextmanager
def downloads(quiet: bool) -> Iterator[None]:
    """Show the hub's progress bars of a download or an upload on a terminal, unless quiet."""
    with hub.progress_bars(not quiet and sys.stderr.isatty()):
        yield


def print_comparison(metrics: Mapping[str, Any]) -> None:
    """Print the metrics of the original and the compressed model, one per line, and the texts they wrote; or those of one model."""
    sides = Metrics.model_validate(metrics)
    alone = next(iter(metrics)) if len(metrics) == 1 else None
    table = Table("", *([alone] if alone else ["original", "compressed", ""]), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    measured = sides.original if alone == "original" else sides.compressed
    for row in compare.rows(Side() if alone else sides.original, measured):
        table.add_row(*map(escape, (row.name, row.after) if alone else row))
    if table.row_count:
        Console().print(table)
    _print_samples(measured, alone or "compressed")


def _print_samples(side: Side, name: str) -> None:
    """Print each prompt and what the models wrote behind it."""
    console = Console(soft_wrap=True, highlight=False)
    for sample in side.generation.samples if side.generation else ():
        console.print(f"\nprompt: {sample.prompt}", markup=False)
        if sample.original is not None:
            console.print(f"original: {sample.original.strip()}", markup=False)
        console.print(f"{name}: {sample.text.strip()}", markup=False)
        if sample.same is not None:
            console.print(f"({phrases.same_tokens(sample)})", markup=False)


def print_coverage(facts: Mapping[str, Any]) -> None:
    """Print which layers and attention operands are quantized, and which are not."""
    console = Console(soft_wrap=True, highlight=False)
    found = Coverage.model_validate(facts)
    left = dict(coverage.unquantized(found))
    for what, shares in groupby(coverage.shares(found), key=lambda share: share.what):
        console.print(f"{what} of {found.layers} layers: {', '.join(share.words for share in shares)}", markup=False)
        if what in left:
            console.print(f"  not quantized: {', '.join(phrases.several(*group) for group in left[what])}", markup=False)
    if (zeros := coverage.zeros(found)) is not None:
        console.print(zeros, markup=False)
    if found.attentions:
        console.print(f"attention operands quantized in {len(found.attentions)} attention modules")


def print_reuse(facts: Sequence[Mapping[str, Any]]) -> None:
    """Print a line about each caching policy."""
    for policy in map(PolicyRecord.model_validate, facts):
        if found := reuse.reuse_of(policy):
            Console(soft_wrap=True, highlight=False).print(f"{found.policy}: {reuse.sentence(found)}", markup=False)


def print_search(facts: Mapping[str, Any]) -> None:
    """Print the policies of a search, best first, and the reason for each that was left out."""
    found, console = search.told(facts), Console(soft_wrap=True, highlight=False)
    table = Table(*found.columns, box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.justify, column.no_wrap = "left" if number < 2 else "right", number > 0  # a long name is broken before figures are cut
    for row in found.rows:
        table.add_row(*map(escape, row.cells), style="bold" if row.best else None)
    if table.row_count:
        console.print(table)
    for policy, reason in found.left_out:
        console.print(f"{policy}: {reason}", markup=False)
    for sentence in found.sentences:
        console.print(sentence, markup=False)


def headline(facts: Mapping[str, Any]) -> str:
    """Return the result of a search in a sentence, without its full stop."""
    return search.told(facts).sentences[0].removesuffix(".")


def print_plan(plan: Plan) -> None:
    """Print what a recipe will do."""
    console = Console(soft_wrap=True, highlight=False)
    for (method, scheme), count in Counter((linear.method, linear.scheme) for linear in plan.touched).items():
        console.print(f"{method} stores {count} linear layers in {scheme}")
    for line in _grouped(plan.kept) if plan.touched else ():
        console.print(f"not quantized: {line}", markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("weights reached", f"{phrases.percent(plan.share_reached)} of {phrases.number(plan.parameters)}")
    table.add_row("size on disk", f"{phrases.size(plan.source_bytes)} -> {phrases.size(plan.predicted_bytes)}")
    each = "" if plan.processes == 1 else f" in each of {plan.processes} processes"
    table.add_row("peak memory", f"about {phrases.size(plan.peak_memory_bytes)} above the memory of the interpreter{each} (an estimate)")
    if plan.processes_on_machine > 1:
        together = phrases.size(plan.processes_on_machine * plan.peak_memory_bytes)
        table.add_row("", f"about {together} of a machine, for its {plan.processes_on_machine} processes")
    if plan.device_memory_bytes:
        table.add_row(f"peak memory on {plan.device}", f"about {phrases.size(plan.device_memory_bytes)} (an estimate)")
    table.add_row("time", f"about {phrases.seconds(sum(plan.seconds.values()))} with evaluation (an estimate)")
    console.print(table)
    if opens := [engine for engine, reasons in plan.engines.items() if not reasons]:
        shown = [f"{engine} with {plan.instructions[engine]}" if engine in plan.instructions else engine for engine in opens]
        console.print(f"opens in: {', '.join(shown)}", markup=False)
    for engine, reasons in plan.engines.items():
        for reason in reasons:
            console.print(f"not in {engine}: {reason}", markup=False)
    for remark in plan.remarks:
        console.print(f"note: {remark}", markup=False)


def print_problems(plan: Plan) -> None:
    """Print the problems that a recipe has, one a line, on standard error."""
    for problem in plan.problems:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {problem}", markup=False)


def _grouped(kept: Sequence[Kept]) -> Iterator[str]:
    """Yield the unquantized modules by reason, with the same module of every block on one line."""
    for (name, reason), count in Counter((pattern(module.name), module.reason) for module in kept).items():
        yield f"{phrases.several(name, count)}: {reason}"
