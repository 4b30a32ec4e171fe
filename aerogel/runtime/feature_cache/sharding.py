"""Recorded generations shared out among the processes that train a router together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, map_tensors
from aerogel.runtime.feature_cache.replay import Replay
from aerogel.training.distributed import group_size, of_first, share


def shares_of(runs: Sequence[Replay]) -> list[Replay]:
    """The generations with this process's images alone, and both branches of guidance of each.

    Raises AerogelError when processes were given different generations, and where images do not divide by the processes.
    """
    if group_size() == 1:
        return list(runs)
    mine = torch.tensor([len(runs), len(runs[0].calls), sum(len(run.calls[0].kwargs[run.name]) for run in runs)])
    if not torch.equal(mine, first := of_first(mine)):
        raise AerogelError(
            f"process {distributed.get_rank()} was given {mine[0]} generations of {mine[1]} steps and {mine[2]} samples, the first process "
            f"{first[0]} of {first[1]} and {first[2]}: give all processes the same recorded calls"
        )
    return [_share_of(run) for run in runs]


def _share_of(run: Replay) -> Replay:
    parts, samples = 2 if run.halves else 1, len(run.calls[0].kwargs[run.name])
    if samples // parts % group_size():
        raise AerogelError(
            f"a recorded batch of {samples // parts} images does not divide by the {group_size()} processes that train: record as many "
            "at once as do (the batch of the samples), and of all a whole number of batches (their count)"
        )

    cuts: dict[int, Tensor] = {}  # what calls have in common, such as texts, they have in common afterwards too

    def cut(given: Tensor) -> Tensor:
        if given.ndim == 0 or len(given) != samples:
            return given
        if id(given) not in cuts:
            cuts[id(given)] = share(given, parts)
        return cuts[id(given)]

    return replace(run, calls=tuple(Call(call.args, map_tensors(cut, call.kwargs)) for call in run.calls))
