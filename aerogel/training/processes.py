"""What the processes of a group share that train one thing, each on its share of the pictures; alone, none of it does anything.

A group is what the script that runs in each of them made (torch.distributed.init_process_group). B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from aerogel.data.replay import Replay
from aerogel.errors import AerogelError
from aerogel.model.calls import Call, map_tensors


def group_size() -> int:
    """The processes of the group; 1 where there is none."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def averaged(x: Tensor) -> Tensor:
    """The mean over all processes of what each has, without a past for gradients."""
    if group_size() == 1:
        return x
    total = x.detach().to(_place(), torch.float64, copy=True)
    distributed.all_reduce(total)
    return (total / group_size()).to(x.device, x.dtype)


def of_first(x: Tensor) -> Tensor:
    """What the first process has, in all of them."""
    if group_size() == 1:
        return x
    theirs = x.detach().to(_place(), copy=True)
    distributed.broadcast(theirs, 0)
    return theirs.to(x.device)


def variance(x: Tensor) -> Tensor:
    """The variance of what all processes have together, an equal number of values each; as Tensor.var, in float32."""
    if group_size() == 1:
        return x.float().var()
    values, total = x.double(), x.numel() * group_size()
    mean, square = averaged(torch.stack([values.mean(), values.square().mean()]))
    return ((square - mean.square()) * total / (total - 1)).float()


def share(x_B: Tensor, parts: int = 1) -> Tensor:
    """This process's samples, of each of so many equal parts of a batch."""
    if group_size() == 1:
        return x_B
    each = [part.chunk(group_size())[distributed.get_rank()] for part in x_B.chunk(parts)]
    return torch.cat(each) if parts > 1 else each[0]


def shares_of(runs: Sequence[Replay]) -> list[Replay]:
    """The generations with this process's pictures alone, and both branches of guidance of each.

    Raises AerogelError when processes were given different generations, and where pictures do not divide by the processes.
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
            f"a recorded batch of {samples // parts} pictures does not divide by the {group_size()} processes that train: record as many "
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


def _place() -> torch.device:
    """Where tensors have to be to be passed on: nccl knows GPUs only."""
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
