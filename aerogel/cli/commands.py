"""The command line: every command parses, calls one function and prints; heavy libraries are imported when a command runs."""

from __future__ import annotations

import json
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import aerogel
from aerogel.errors import AerogelError

_FAILED = 2


class _Group(TyperGroup):
    """Turns what a user can mend into one line on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        # Threads that spin long while they wait slow each other down on a busy machine, those that never spin are slow to wake on a
        # quiet one (4-bit decoding: 7 ms a token, 15 without spinning; measured). OpenMP reads this when torch is imported.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"aerogel(\.|$)")
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except AerogelError as error:
            _fail(str(error))
        except OSError as error:
            _fail(f"{error.filename or 'the operating system'}: {error.strerror or error}")
        except KeyboardInterrupt:
            _fail("interrupted; nothing was changed")


app = typer.Typer(cls=_Group, help=aerogel.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Argument(help="Name of a reference model, folder, or hub id (owner/name).", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="METHOD.KNOB=VALUE", help="Override an option; may be repeated.")]
Count = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration sequences [128], or images [64].")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="Tokens of a calibration sequence [512].")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoisers: steps of the sampler they will be used with [20].")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Denoisers: guidance scale; by default the pipeline's own.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Calibration text [sotu]: shipped name, .txt, .jsonl (with images: chats), or a datasets folder; denoisers: a prompt a line.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch; by default all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
Against = Annotated[str | None, typer.Option("--against", help="The original to compare with.")]


class Kind(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    methods = "methods"
    families = "families"
    exporters = "exporters"
    measures = "measures"
    models = "models"


@app.command()
def compress(
    model: Model,
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist or be empty.")],
    overrides: Overrides = None,
    samples: Count = None,
    length: Length = None,
    data: Data = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure quality, size and speed at the end.")] = True,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compress a model by a recipe, save it, and say what it cost and won."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import run
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.preflight import partial_of

    try:
        with terminal.progress(as_json) as tell:
            result = run.compress(
                model,
                recipe,
                output=output,
                overrides=overrides or (),
                samples=CalibrationRequest(data, samples, length, steps, guidance),
                measures=None if evaluate else (),
                seed=seed,
                resume=resume,
                tell=tell,
            )
    except KeyboardInterrupt as error:
        kept = (
            f"{partial_of(output)} keeps what is finished: add --resume to go on" if partial_of(output).exists() else "nothing was changed"
        )
        raise AerogelError(f"interrupted; {kept}") from error
    report = result.report()
    if as_json:
        _print_json({"folder": str(output), "report": str(report), **result.facts})
        return
    terminal.print_coverage(result.facts["coverage"])
    terminal.print_reuse(result.facts.get("policies", ()))
    terminal.print_comparison(result.metrics)
    typer.echo(f"folder  {output}\nreport  {report}")


@app.command()
def plan(
    model: Model,
    recipe: RecipeName,
    overrides: Overrides = None,
    samples: Count = None,
    length: Length = None,
    steps: Steps = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe will do to a model: layers, size, memory, time; no weight is changed."""
    _start()
    from aerogel.cli import terminal
    from aerogel.engine import planning
    from aerogel.engine.calibration import CalibrationRequest

    made = planning.plan(model, recipe, overrides=overrides or (), samples=CalibrationRequest(count=samples, length=length, steps=steps))
    _print_json(made.as_dict()) if as_json else terminal.print_plan(made)
    if made.problems:
        raise typer.Exit(_FAILED)


@app.command()
def search(
    model: Model,
    task: Annotated[
        str, typer.Option("--task", help="cache, a policy of reuse between steps, or skip, a rule for experts of a mixture.")
    ] = "cache",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Times that denoising has to be faster [1.5x]; share of expert calls to drop [0.67].")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the best policy and the report.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="METHOD", help="Policy to try; may be repeated [all].")] = None,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Images, chats or sequences to calibrate on, and as many to judge by.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Prompts, one a line; chats (.jsonl), or text.")] = None,
    length: Length = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Hold all caching policies of a pipeline, or all rules that skip experts, against each other at one budget; keep the best."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.search import searching

    with terminal.progress(as_json) as tell:
        findings = searching.search(
            model,
            task,
            budget,
            samples=CalibrationRequest(data, samples, length, steps, guidance),
            only=only or (),
            overrides=overrides or (),
            output=output,
            seed=seed,
            tell=tell,
        )
    _print_json(findings.facts) if as_json else terminal.print_search(findings.facts)
    if output is not None and not as_json:
        typer.echo(f"folder  {output}\nreport  {output / 'report.html'}")
    if findings.best is None:
        raise typer.Exit(_FAILED)


@app.command()
def evaluate(
    model: Model,
    against: Against = None,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", help="Measure to take; may be repeated. Default: all that fit.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="MEASURE.KNOB=VALUE", help="Set an option of a measure; may be repeated.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure the quality of a model, beside its original when given; numbers are added to a compressed folder's record."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import scores

    with terminal.progress(as_json) as tell:
        metrics = scores.measure_models(model, against, measures or None, tell, overrides or ())
    _print_json(metrics) if as_json else terminal.print_comparison(metrics)


@app.command()
def bench(
    model: Model,
    against: Against = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences or images at once.")] = 1,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Text: tokens of the prompt [512].")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=2, help="Text: tokens to generate [32].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Images: steps of the sampler [20].")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Images: guidance scale; by default the pipeline's own.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Turns of each model [3].")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decoding, or images, in turns with the original when given; numbers are added to a compressed folder's record."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import scores

    asked = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "steps": steps, "guidance": guidance, "rounds": rounds}
    metrics = scores.time_models(model, against, asked)
    _print_json(metrics) if as_json else terminal.print_comparison(metrics)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `aerogel compress` wrote.", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="Name of an exporter; `aerogel list exporters` lists them.")],  # noqa: A002
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist or be empty.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FORMAT.KNOB=VALUE", help="Set an option of the exporter; may be repeated.")
    ] = None,
) -> None:
    """Rewrite a compressed folder for another engine, without calibrating again."""
    _start()
    from aerogel.engine import exporting

    exporting.export(folder, format, output, overrides or ())
    typer.echo(output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `aerogel compress` or `search` wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; by default report.html in the folder.")] = None,
) -> None:
    """Write the report of a compressed folder, or of a search, as one self-contained HTML file."""
    from aerogel.report import page, search

    typer.echo((search if (folder / search.FILE).is_file() else page).write(folder, output))


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)], as_json: AsJson = False) -> None:
    """List recipes, methods, families, exporters, measures or models, with one line on each."""
    from aerogel.cli import cards

    lines = cards.summaries(kind)
    if as_json:
        _print_json(lines)
        return
    width = max(map(len, lines), default=0)
    for name, summary in lines.items():
        typer.echo(f"{name:<{width}}  {summary}".rstrip())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of anything that `aerogel list` lists.", show_default=False)], as_json: AsJson = False
) -> None:
    """Show the cards that bear a name: what it does, where it comes from, its options with their defaults, what it needs."""
    from aerogel.cli import cards

    shown = cards.show(name)
    _print_json(shown) if as_json else typer.echo("\n\n\n".join(map(cards.as_text, shown)))


def main() -> None:
    """Run the command line."""
    app()


def _start(threads: int | None = None) -> None:
    """Set the libraries up for a command: threads, and no chatter of their own."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, default=str))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _fail(reason: str) -> None:
    typer.echo(f"error: {' '.join(reason.split())}", err=True)
    raise typer.Exit(_FAILED)
