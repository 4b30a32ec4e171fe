"""Collectives for processes that train one thing, each on its share of the samples; with one process they do nothing.

A group is what the script that runs in each of them made (torch.distributed.init_process_group). B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


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
    """Broadcast the first process's tensor to all."""
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


def _place() -> torch.device:
    """Return the device from which tensors can be sent: nccl knows GPUs only."""
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
