"""Sharing of a run among processes: the walks whose calls they share, the steps that each does in full, and what that means for memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from aerogel.engine.stages import stages_of
from aerogel.errors import AerogelError
from aerogel.methods.base import BlockMethod, CalibrationSize
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.processes import Processes
from aerogel.recipe import Recipe, Step


def reads_calls(steps: Iterable[Step]) -> bool:
    """Return True where one of the steps reads activations."""
    return any("calls" in step.method.requires for step in steps)


def shares_calls(steps: Sequence[Step]) -> bool:
    """Return True where processes can share the calls of a walk: every step that reads them adds up over processes what it has seen."""
    return reads_calls(steps) and all(step.method.shares_calls for step in steps if "calls" in step.method.requires)


def in_full(network: Network, recipe: Recipe, processes: Processes) -> Iterator[str]:
    """Say which steps every process does in full, for the plan; blocks that are in files are divided where no step reads calls."""
    if processes.alone:
        return
    for steps in stages_of(recipe):
        by_blocks = isinstance(steps[0].method, BlockMethod) and not reads_calls(steps) and network.checkpoint is not None
        if shares_calls(steps) or by_blocks:
            continue
        alone = [step.name for step in steps if "calls" in step.method.requires and not step.method.shares_calls]
        for step in steps:
            because = "" if step.name in alone or not alone else f", because {alone[0]} in the same walk does not share calls"
            yield f"{step.name} is done by every process in full{because}"


def share_of(recipe: Recipe, read: CalibrationSize, processes: Processes) -> CalibrationSize:
    """Return the size of what one process reads of a calibration: a part where all steps share the calls, else all of it."""
    reading = [steps for steps in stages_of(recipe) if reads_calls(steps)]
    if all(map(shares_calls, reading)):
        return read._replace(tokens=-(-read.tokens // processes.count))
    return read


def check_shares(recipe: Recipe, calls: Sequence[Call], processes: Processes) -> None:
    """Refuse more processes than calls; raises AerogelError."""
    walks = (steps for steps in stages_of(recipe) if isinstance(steps[0].method, BlockMethod))
    if len(calls) < processes.count and any(map(shares_calls, walks)):
        raise AerogelError(
            f"the calibration has fewer calls ({len(calls)}) than there are processes to share them ({processes.count}); give more "
            "samples, a smaller batch_size, or start fewer processes"
        )
