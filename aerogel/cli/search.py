"""The command that searches for the best policy or recipe."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aerogel.cli import arguments as given
from aerogel.cli import completion
from aerogel.cli.app import command, print_json, start
from aerogel.cli.group import COMPRESS, DATA, OUTPUT
from aerogel.cli.interrupts import interruptible
from aerogel.errors import AerogelError

if TYPE_CHECKING:
    from aerogel.engine.search.searching import Findings

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        autocompletion=completion.words("cache", "skip", "tokens", "sparsity", "structured"),
        help="cache: feature-caching policies of a diffusion pipeline; skip: expert-skipping policies of an MoE model; "
        "tokens: policies that drop tokens of images or long prompts; sparsity: recipes that prune any model, in three stages: every "
        "criterion with one share for all layers, every allocation with the best two criteria, every adjustment behind the best two; "
        "structured: methods by which layers, channels, heads or filters leave.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="BUDGET",
        help="cache: speed-up of denoising [1.5x]; skip: share of token-expert assignments to drop [0.67]; "
        "tokens: speed-up of reading prompts, such as 2x, or share of tokens to compute, such as 25% [2x]; "
        "sparsity: share of zeros in the layers of the blocks, a pattern such as 2:4, or the bytes they may take, such as 40MB [0.5]; "
        "structured: speed-up of a forward [1.2x].",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="METHOD",
        autocompletion=completion.names("methods"),
        help="Method to try; may be repeated [all]. Of sparsity, methods that train are tried only where they are named.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        rich_help_panel=DATA,
        help="As --data of compress. cache: prompts; skip: chats or text; tokens: chats with images, or text or needles:KEYS for long "
        "prompts; sparsity, structured: what the model reads.",
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        rich_help_panel=DATA,
        help="Calibration samples (images, chats or sequences); as many again are held out to compare them.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FOLDER", rich_help_panel=OUTPUT, help="Output folder for the best policy or recipe and the report."
    ),
]


@command(COMPRESS, "Compare all methods that cache features, skip experts, drop tokens, prune weights or remove parts at one budget.")
def search(
    model: given.Model,
    task: Task = "cache",
    budget: Budget = None,
    only: Only = None,
    overrides: given.PolicyOverrides = None,
    device: given.Device = "auto",
    dtype: given.ComputeDType = None,
    revision: given.Revision = None,
    trust_remote_code: given.TrustRemoteCode = False,
    merge_adapter: given.MergeAdapter = False,
    data: Prompts = None,
    column: given.Column = None,
    samples: Count = None,
    length: given.Length = None,
    steps: given.Steps = None,
    guidance: given.Guidance = None,
    height: given.Height = None,
    width: given.Width = None,
    num_frames: given.NumFrames = None,
    seed: given.Seed = None,
    output: Output = None,
    resume: given.Resume = False,
    threads: given.Threads = None,
    quiet: given.Quiet = False,
    as_json: given.AsJson = False,
) -> None:
    """Compare all methods that cache features, skip experts, drop tokens, prune weights or remove parts at one budget."""
    start(threads)
    from aerogel.cli import terminal
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.requests import ModelOptions
    from aerogel.engine.search import searching

    with terminal.downloads(quiet or as_json):
        source = ModelOptions(dtype, revision, trust_remote_code, device, merge_adapter).locate(model)

    with interruptible(partial(_kept, output)), terminal.progress(quiet or as_json) as tell:
        findings = searching.search(
            source,
            task,
            budget,
            samples=CalibrationRequest(
                data, samples, length, steps, guidance, height=height, width=width, num_frames=num_frames, column=column
            ),
            only=only or (),
            overrides=overrides or (),
            output=output,
            device=device,
            seed=seed or 0,
            resume=resume,
            tell=tell,
        )
    _show(findings, model, output, as_json)


def _kept(output: Path | None) -> str:
    """Say what an interrupted search leaves."""
    from aerogel.engine.preflight import partial_of

    folder = None if output is None else partial_of(output)
    there = folder is not None and folder.exists()
    return f"{folder} keeps the recipes that were judged: add --resume to continue" if there else "nothing was changed"


def _show(findings: Findings, model: str, output: Path | None, as_json: bool) -> None:
    """Print what was found, and the next command where a recipe was; raises AerogelError where nothing met the budget."""
    from aerogel.cli import terminal
    from aerogel.engine.search.searching import RECIPE

    print_json(findings.facts) if as_json else terminal.print_search(findings.facts)
    if output is not None and not as_json:
        typer.echo(f"folder  {output}\nreport  {output / 'report.html'}")
        if (recipe := output / RECIPE).is_file():
            typer.echo(f"next    aerogel compress {shlex.quote(model)} --recipe {shlex.quote(str(recipe))} --output OUT")
    if findings.best is None:
        raise AerogelError(f"{terminal.headline(findings.facts)}; give a smaller --budget, or other methods (--only)")
