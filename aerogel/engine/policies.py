"""Runtime policies on disk: their states as tensors beside the weights and numbers in aerogel.json, put back on as contexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.states import STATES, stored
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.feature_cache.policy import FeatureCachePolicy, ScheduleRefiner
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.recipe import Recipe, Step
from aerogel.runtime.feature_cache.schedule import Schedule, slot_bytes
from aerogel.runtime.feature_cache.units import Costs, costs_of
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy with the state that its calibration gave."""

    step: Step
    state: Any
    """The record that the policy's class declares as its state."""


def calibrated(network: Network, step: Step, calls: Sequence[Call], before: CalibratedPolicy | None = None) -> CalibratedPolicy:
    """Calibrate a policy, or let it revise the one before; one that reuses by a schedule and does nothing else is told what that saves.

    Of one sample, of which an image under guidance has two: `macs` are the multiply-accumulates of a forward, `macs_saved` the share of
    a whole run's that is left out, `slot_bytes` the most that is held between two steps.
    """
    method = step.method
    assert isinstance(method, RuntimePolicy)
    plain = isinstance(method, FeatureCachePolicy) and method.plain
    # Before the policy is made, which may take hours: what cannot be counted fails now.
    costs = costs_of(network, calls[0]) if plain and calls else None
    if isinstance(method, ScheduleRefiner) and before is not None:
        if why := unrevisable(step, [before.step]):
            raise AerogelError(why)
        state = method.revise(network, calls, before.state)
    else:
        state = method.calibrate(network, calls)
    if costs is not None:
        state = state | _saving(Schedule.of(network, state), costs, len(tensors_in((calls[0].args, calls[0].kwargs))[0]))
    return CalibratedPolicy(step, state)


def revised(step: Step, before: Sequence[CalibratedPolicy]) -> CalibratedPolicy | None:
    """The last of the policies before, if this step goes on from it."""
    return before[-1] if before and isinstance(step.method, ScheduleRefiner) else None


def unrevisable(step: Step, policies: Sequence[Step]) -> str:
    """Why a step that goes on from a schedule cannot do so behind these policies; empty where it can."""
    last = policies[-1] if policies else None
    if last is not None and isinstance(last.method, FeatureCachePolicy) and last.method.plain:
        return ""
    behind = f"the policy before it is {last.name}" if last else "there is no policy before it"
    return f"{step.name} goes on from a schedule of reuse, and {behind}; put one such as harmonica or schedule_search right before it"


def _saving(schedule: Schedule, costs: Costs, samples: int) -> dict[str, Any]:
    reused_TN = ~schedule.computed_TN[1:]  # nothing is kept before the first step
    saved = float((reused_TN.double() @ torch.tensor(costs.unit_macs, dtype=torch.float64)).sum())
    return {
        "macs": costs.macs / samples,
        "macs_saved": saved / (len(schedule.steps) * costs.macs),
        "slot_bytes": slot_bytes(schedule, costs.unit_bytes) // samples,
    }


@contextmanager
def on(network: Network, policies: Sequence[CalibratedPolicy]) -> Iterator[None]:
    """Put policies on in the order of the recipe; afterwards the network is what it was."""
    with ExitStack() as stack:
        for measured in policies:
            assert isinstance(measured.step.method, RuntimePolicy)
            stack.enter_context(measured.step.method.on(network, measured.state))
        yield


def save(policies: Sequence[CalibratedPolicy], folder: Path) -> list[dict[str, Any]]:
    """Write the tensors of all states into a folder; the rest is returned for aerogel.json."""
    tensors = {
        f"{number}.{key}": value.detach().contiguous()
        for number, measured in enumerate(policies)
        for key, value in _saved(measured.state).items()
        if isinstance(value, Tensor)
    }
    if tensors:
        save_file(tensors, folder / STATES)
    return [
        {
            "step": measured.step.as_dict(),
            "state": {key: value for key, value in _saved(measured.state).items() if not isinstance(value, Tensor)},
        }
        for measured in policies
    ]


def _saved(state: Any) -> Mapping[str, Any]:
    """What is saved of a state, by key; a dict is that of a policy that declares no class yet."""
    return state.as_dict() if isinstance(state, PolicyState) else state


def load(folder: Path | None) -> list[CalibratedPolicy]:
    """Read back what `save` wrote; empty when the folder has no policies."""
    if folder is None:
        return []
    read = []
    for named, state in stored(folder):
        (step,) = Recipe.parse({"steps": [named]}).steps
        assert isinstance(step.method, RuntimePolicy)
        read.append(CalibratedPolicy(step, step.method.read(state)))
    return read
