"""Commands that compress: compress, and plan, its dry run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aerogel.cli import arguments as given
from aerogel.cli.app import command, print_json, start
from aerogel.cli.group import COMPRESS, FAILED
from aerogel.cli.interrupts import interruptible
from aerogel.cli.share import push_folder

if TYPE_CHECKING:
    from aerogel.engine.requests import RunRequest
    from aerogel.engine.result import Result
    from aerogel.model.processes import Processes


@command(COMPRESS, "Compress a model with a recipe and save it, with a report.")
def compress(
    recipe: given.RecipeName,
    model: given.OptionalModel = None,
    output: given.Output = None,
    scheme: given.Scheme = None,
    targets: given.Targets = None,
    ignore: given.Ignore = None,
    overrides: given.Overrides = None,
    engine: given.Engine = None,
    device: given.Device = "auto",
    dtype: given.ComputeDType = None,
    revision: given.Revision = None,
    trust_remote_code: given.TrustRemoteCode = False,
    merge_adapter: given.MergeAdapter = False,
    data: given.Data = None,
    column: given.Column = None,
    samples: given.Count = None,
    length: given.Length = None,
    steps: given.Steps = None,
    guidance: given.Guidance = None,
    height: given.Height = None,
    width: given.Width = None,
    num_frames: given.NumFrames = None,
    batch_size: given.BatchSize = None,
    seed: given.Seed = None,
    resume: given.Resume = False,
    evaluate: given.Evaluate = True,
    push_to_hub: given.PushToHub = None,
    public: given.Public = False,
    threads: given.Threads = None,
    quiet: given.Quiet = False,
    as_json: given.AsJson = False,
) -> None:
    """Compress a model with a recipe, save it, and report quality, size and speed.

    A recipe file may also give the model, the data and the output; arguments here win over the file.
    """
    start(threads, in_several=True)
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.requests import Adjustments, ModelOptions, RunRequest
    from aerogel.model.processes import Processes

    request = RunRequest.of(
        recipe,
        model=model,
        options=ModelOptions(dtype, revision, trust_remote_code, device, merge_adapter),
        adjustments=Adjustments(overrides or (), scheme, targets or (), ignore or ()),
        samples=CalibrationRequest(
            data, samples, length, steps, guidance, height=height, width=width, num_frames=num_frames, column=column
        ),
        batch_size=batch_size,
        seed=seed,
        output=output,
    )
    processes = Processes.join(device)
    result = _compressed(request, push_to_hub, evaluate, resume, quiet or as_json, processes, engine)
    processes.leave()
    if processes.first:
        _tell(result, request.require_output(), push_to_hub, public, quiet, as_json)


def _tell(result: Result, folder: Path, push_to_hub: str | None, public: bool, quiet: bool, as_json: bool) -> None:
    """Write the report, print what came out, and push it where that is asked for."""
    report = result.report()
    if not as_json:
        _print_result(result, folder, report)
    hub = {}
    if push_to_hub is not None:
        hub["hub"] = push_folder(folder, push_to_hub, public, quiet=quiet or as_json, said=not as_json)
    if as_json:
        print_json({"folder": str(folder), "report": str(report), **hub, **result.facts})


def _compressed(
    request: RunRequest, push_to_hub: str | None, evaluate: bool, resume: bool, quiet: bool, processes: Processes, engine: str | None
) -> Result:
    """Do the run after the checks that need no model; returns its result."""
    from aerogel.cli import terminal
    from aerogel.engine import pushing, run
    from aerogel.engine.preflight import partial_of

    folder = request.require_output()
    processes.of_first(request.check_output)
    if push_to_hub is not None:
        processes.of_first(partial(pushing.check, push_to_hub))
    with terminal.downloads(quiet):
        source = processes.first_then_others(request.locate)

    def left() -> str:
        partial = partial_of(folder)
        return f"{partial} keeps the finished blocks: add --resume to continue" if partial.exists() else "nothing was changed"

    with interruptible(left), terminal.progress(quiet or not processes.first) as tell:
        return run.compress(
            source,
            request.recipe,
            output=folder,
            samples=request.samples,
            measures=None if evaluate else (),
            seed=request.seed,
            resume=resume,
            device=request.options.device,
            batch_size=request.batch_size,
            processes=processes,
            engine=engine,
            tell=tell,
        )


def _print_result(result: Result, folder: Path, report: Path) -> None:
    from aerogel.cli import terminal

    terminal.print_coverage(result.facts["coverage"])
    terminal.print_reuse(result.facts.get("policies", ()))
    terminal.print_comparison(result.metrics)
    typer.echo(f"folder  {folder}\nreport  {report}")


@command(COMPRESS, "Dry run: affected layers, size, memory and time; no weight is changed.")
def plan(
    recipe: given.RecipeName,
    model: given.OptionalModel = None,
    scheme: given.Scheme = None,
    targets: given.Targets = None,
    ignore: given.Ignore = None,
    overrides: given.Overrides = None,
    engine: given.Engine = None,
    device: given.Device = "auto",
    dtype: given.ComputeDType = None,
    revision: given.Revision = None,
    trust_remote_code: given.TrustRemoteCode = False,
    merge_adapter: given.MergeAdapter = False,
    data: given.Data = None,
    column: given.Column = None,
    samples: given.Count = None,
    length: given.Length = None,
    steps: given.Steps = None,
    guidance: given.Guidance = None,
    height: given.Height = None,
    width: given.Width = None,
    num_frames: given.NumFrames = None,
    batch_size: given.BatchSize = None,
    seed: given.Seed = None,
    processes: given.ProcessCount = None,
    quiet: given.Quiet = False,
    as_json: given.AsJson = False,
) -> None:
    """Dry run with the options of compress: show the affected layers, and estimate size, memory and time; no weight is changed."""
    start(in_several=True)
    from aerogel.cli import terminal
    from aerogel.engine import planning
    from aerogel.engine.calibration import CalibrationRequest
    from aerogel.engine.requests import Adjustments, ModelOptions, RunRequest
    from aerogel.model.processes import Processes

    request = RunRequest.of(
        recipe,
        model=model,
        options=ModelOptions(dtype, revision, trust_remote_code, device, merge_adapter),
        adjustments=Adjustments(overrides or (), scheme, targets or (), ignore or ()),
        samples=CalibrationRequest(
            data, samples, length, steps, guidance, height=height, width=width, num_frames=num_frames, column=column
        ),
        batch_size=batch_size,
        seed=seed,
    )
    shared_by = Processes.started() if processes is None else Processes(count=processes, on_machine=processes)
    if not shared_by.first:
        return
    with terminal.downloads(quiet or as_json):
        source = request.locate()
    made = planning.plan(
        source, request.recipe, samples=request.samples, device=device, batch_size=request.batch_size, processes=shared_by, engine=engine
    )
    print_json(made.as_dict()) if as_json else terminal.print_plan(made)
    terminal.print_problems(made)
    if made.problems:
        raise typer.Exit(FAILED)
