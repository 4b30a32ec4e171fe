"""Commands that measure: evaluate, bench, and the report on what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aerogel.cli import arguments as given
from aerogel.cli import completion
from aerogel.cli.app import command, print_json, start
from aerogel.cli.group import MEASURE


@command(MEASURE, "Measure quality, against the original if given.")
def evaluate(
    model: given.Model,
    against: given.Against = None,
    measures: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="MEASURE",
            autocompletion=completion.names("measures"),
            help="Measure to run; may be repeated [all that apply].",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MEASURE.OPTION=VALUE",
            autocompletion=completion.names("measures", suffix="."),
            help="Set an option of a measure; may be repeated.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Text or chats to read, as --data of compress [each measure's own]."),
    ] = None,
    column: given.Column = None,
    device: given.Device = "auto",
    dtype: given.ComputeDType = None,
    revision: given.Revision = None,
    trust_remote_code: given.TrustRemoteCode = False,
    merge_adapter: given.MergeAdapter = False,
    threads: given.Threads = None,
    quiet: given.Quiet = False,
    as_json: given.AsJson = False,
) -> None:
    """Measure quality, and compare with the original if given; results are added to aerogel.json of a compressed folder."""
    start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import scores
    from aerogel.engine.requests import ModelOptions

    with terminal.downloads(quiet or as_json):
        source, original = ModelOptions(dtype, revision, trust_remote_code, device, merge_adapter).locate_pair(model, against)
    with terminal.progress(quiet or as_json) as tell:
        metrics = scores.measure_models(source, original, measures or None, tell, overrides or (), device, data, column)
    print_json(metrics) if as_json else terminal.print_comparison(metrics)


@command(MEASURE, "Time decoding or image generation, in turns with the original if given.")
def bench(
    model: given.Model,
    against: given.Against = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Batch size: sequences or images.")] = 1,
    prompt: Annotated[int | None, typer.Option("--prompt", metavar="N", min=1, help="Text: prompt tokens [512].")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", metavar="N", min=2, help="Text: new tokens to generate [32].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Images: sampling steps [20].")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="SCALE", help="Images: guidance scale [the pipeline's default].")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="N", min=1, help="Timed rounds per model [3].")] = None,
    device: given.Device = "auto",
    dtype: given.ComputeDType = None,
    revision: given.Revision = None,
    trust_remote_code: given.TrustRemoteCode = False,
    merge_adapter: given.MergeAdapter = False,
    threads: given.Threads = None,
    quiet: given.Quiet = False,
    as_json: given.AsJson = False,
) -> None:
    """Time prefill and decoding, or image generation, alternating with the original if given; results are added to aerogel.json."""
    start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import scores
    from aerogel.engine.requests import ModelOptions

    with terminal.downloads(quiet or as_json):
        source, original = ModelOptions(dtype, revision, trust_remote_code, device, merge_adapter).locate_pair(model, against)
    asked = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "steps": steps, "guidance": guidance, "rounds": rounds}
    metrics = scores.time_models(source, original, asked, device)
    print_json(metrics) if as_json else terminal.print_comparison(metrics)


@command(MEASURE, "Write the report of a compressed folder as one HTML file.")
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder written by `aerogel compress` or `aerogel search`.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="HTML file [report.html in the folder].")] = None,
) -> None:
    """Write the report of a compressed folder or a search as one self-contained HTML file."""
    from aerogel.report import page, search

    typer.echo((search if (folder / search.FILE).is_file() else page).write(folder, output))
