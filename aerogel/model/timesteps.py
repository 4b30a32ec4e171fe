"""The time steps of a denoiser's recorded calls."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from aerogel.layers.timestep_index import timestep_of
from aerogel.model.calls import Call


def steps_of(denoiser: nn.Module, calls: Iterable[Call]) -> tuple[float, ...]:
    """The distinct time steps of recorded calls in the order in which they come."""
    given = (timestep_of(denoiser, call.args, call.kwargs) for call in calls)
    found = (step for one in given for step in (one.flatten().tolist() if isinstance(one, Tensor) else [one]))
    return tuple(dict.fromkeys(float(step) for step in found))
