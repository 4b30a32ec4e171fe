"""Commands: each one parses its arguments, calls one function and prints; heavy libraries are imported when a command runs."""

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
from aerogel.cli.interrupts import interruptible
from aerogel.errors import AerogelError

_FAILED = 2


class _Group(TyperGroup):
    """Group of commands that turns an error of the user into one line on standard error and exit code 2."""

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
                with interruptible(lambda: "nothing was changed"):
                    return super().invoke(ctx)
        except AerogelError as error:
            _fail(str(error))
        except OSError as error:
            reason = error.strerror or str(error)
            _fail(f"{error.filename}: {reason}" if error.filename else reason)


# Without rich markup: it would take a default in brackets, such as [sotu], for a style and drop it from the help text.
app = typer.Typer(
    cls=_Group,
    help=aerogel.__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Model to open: a folder, a hub id (owner/name), or the name of a reference model.", show_default=False)
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Shipped recipe by name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="Override one option of a step; may be repeated.")
]
Count = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Number of calibration samples: sequences [128], or images of a diffusion model [64]."),
]
Length = Annotated[int | None, typer.Option("--length", min=1, help="Tokens per calibration sequence [512].")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Diffusion: sampling steps the model will be used with [20].")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Diffusion: guidance scale [the pipeline's default].")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Calibration data [sotu]: shipped text by name, .txt, .jsonl (text or chats with images), or a datasets folder. "
        "Diffusion: file with one prompt per line.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of torch [all cores].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]
Against = Annotated[str | None, typer.Option("--against", help="Original model to compare with.")]


class Kind(StrEnum):
    """Kinds of names that can be listed."""

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
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must be new or empty.")],
    overrides: Overrides = None,
    samples: Count = None,
    length: Length = None,
    data: Data = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure quality, size and speed after compression.")] = True,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compress a model with a recipe, save it, and report quality, size and speed."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import run
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.preflight import partial_of

    def left() -> str:
        folder = partial_of(output)
        return f"{folder} keeps the finished blocks: add --resume to continue" if folder.exists() else "nothing was changed"

    with interruptible(left), terminal.progress(as_json) as tell:
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
    """Dry run: show the affected layers, and estimate size, memory and time; no weight is changed."""
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
        str,
        typer.Option(
            "--task", help="cache: feature-caching policies of a diffusion pipeline; skip: expert-skipping policies of an MoE model."
        ),
    ] = "cache",
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="cache: speed-up of denoising [1.5x]; skip: share of token-expert assignments to drop [0.67]."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Output folder for the best policy and the report.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="METHOD", help="Policy to try; may be repeated [all].")] = None,
    overrides: Overrides = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, help="Calibration samples (images, chats or sequences); as many again are held out to compare policies."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="cache: file with one prompt per line; skip: chats (.jsonl) or text.")] = None,
    length: Length = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compare all feature-caching or expert-skipping policies at one budget and keep the best."""
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
    measures: Annotated[list[str] | None, typer.Option("--measure", help="Measure to run; may be repeated [all that apply].")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="MEASURE.OPTION=VALUE", help="Set an option of a measure; may be repeated.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure quality, and compare with the original if given; results are added to aerogel.json of a compressed folder."""
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
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size: sequences or images.")] = 1,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Text: prompt tokens [512].")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=2, help="Text: new tokens to generate [32].")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Images: sampling steps [20].")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Images: guidance scale [the pipeline's default].")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Timed rounds per model [3].")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decoding, or image generation, alternating with the original if given; results are added to aerogel.json."""
    _start(threads)
    from aerogel.cli import terminal
    from aerogel.engine import scores

    asked = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "steps": steps, "guidance": guidance, "rounds": rounds}
    metrics = scores.time_models(model, against, asked)
    _print_json(metrics) if as_json else terminal.print_comparison(metrics)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder written by `aerogel compress`.", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="Output format; see `aerogel list exporters`.")],  # noqa: A002
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must be new or empty.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FORMAT.OPTION=VALUE", help="Set an option of the format; may be repeated.")
    ] = None,
) -> None:
    """Convert a compressed folder to another format, without calibrating again."""
    _start()
    from aerogel.engine import exporting

    exporting.export(folder, format, output, overrides or ())
    typer.echo(output)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder written by `aerogel compress` or `aerogel search`.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file [report.html in the folder].")] = None,
) -> None:
    """Write the report of a compressed folder or a search as one self-contained HTML file."""
    from aerogel.report import page, search

    typer.echo((search if (folder / search.FILE).is_file() else page).write(folder, output))


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="Kind to list.", show_default=False)], as_json: AsJson = False) -> None:
    """List recipes, methods, families, exporters, measures or models, one per line."""
    from aerogel.cli import cards

    lines = cards.summaries(kind)
    if as_json:
        _print_json(lines)
        return
    width = max(map(len, lines), default=0)
    for name, summary in lines.items():
        typer.echo(f"{name:<{width}}  {summary}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name from `aerogel list`.", show_default=False)], as_json: AsJson = False) -> None:
    """Show a method, recipe, family, exporter or measure: description, paper, options with defaults, requirements."""
    from aerogel.cli import cards

    shown = cards.show(name)
    _print_json(shown) if as_json else typer.echo("\n\n\n".join(map(cards.as_text, shown)))


def main() -> None:
    """Run the command line."""
    app()


def _start(threads: int | None = None) -> None:
    """Prepare the libraries for a command: number of threads, no log output of transformers."""
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
