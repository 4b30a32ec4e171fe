"""Checks before any work: what would make a run fail after hours is found in its first seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aerogel.engine.planning import Plan
from aerogel.engine.requirements import unmet, unmet_by_calls
from aerogel.engine.resume import RUN
from aerogel.errors import AerogelError
from aerogel.io import save
from aerogel.io.record import files
from aerogel.methods.base import Before, CalibrationSize
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe


def partial_of(output: Path) -> Path:
    """The folder beside the output that holds a run's progress."""
    output = output if output.name else output.absolute()  # of `.` the name of the folder
    return output.with_name(f"{output.name}.partial") if output.name else output / ".partial"


def check_plan(plan: Plan) -> None:
    """Refuse a recipe that cannot run on the network; raises AerogelError with the first reason."""
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more; `aerogel plan` lists them)" if len(plan.problems) > 1 else ""
        raise AerogelError(f"recipe {plan.recipe!r}: {plan.problems[0]}{more}")


def check_steps(network: Network, recipe: Recipe, size: CalibrationSize) -> None:
    """Refuse a recipe of policies that the network cannot be given; raises AerogelError with the first reason."""
    for number, step in enumerate(recipe.steps):
        for problem in unmet(network, step, recipe.steps[:number], Before(size)):
            raise AerogelError(f"recipe {recipe.name!r}: {problem}")


def check_calls(network: Network, recipe: Recipe, calls: Sequence[Call]) -> None:
    """Refuse a recipe that the calls of the calibration do not serve; raises AerogelError with the first reason."""
    for problem in unmet_by_calls(network, recipe, calls):
        raise AerogelError(f"recipe {recipe.name!r}: {problem}")


def check_output(output: Path, needed_bytes: int, origin: Path | None, resume: bool) -> None:
    """Make sure that the output can be written and that no unfinished run is in the way; raises AerogelError."""
    check_finished(output)
    partial = partial_of(output)
    if partial.exists() and not (partial / RUN).exists():
        raise AerogelError(f"{partial} is in the way and is no unfinished run; move it, or give another output")
    if partial.exists() and not resume:
        raise AerogelError(f"{partial} holds an unfinished run; add --resume to resume it, or remove the folder to start again")
    save.preflight(output, needed_bytes, origin)


def check_finished(output: Path) -> None:
    """Refuse an output that a killed run had finished already but for the progress folder; raises AerogelError."""
    partial = partial_of(output)
    if partial.exists() and (output / files.FILE).is_file():
        raise AerogelError(f"{output} is finished, and {partial} is left over from its run; remove {partial.name}, or give another output")
