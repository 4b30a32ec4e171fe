"""Weights shared out among processes by FSDP2: each keeps its part of every block, and a block is whole only while it runs.

For work that goes along a whole network whose weights stay as they are. What is trained beside them, such as a router, is each process's
own. Buffers, and with them the integer codes of quantized layers, are whole in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from aerogel.model.hooks import temporary_hooks
from aerogel.training.distributed import group_size

_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has; of those that are mappings the contents are put back, since handles of hooks know them."""


@contextmanager
def sharded(
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    device: torch.device,
    bring: Callable[[str], None],
    forward: Callable[[], Any],
) -> Iterator[None]:
    """Share out the weights of a network among the processes of the group for a while; all of them then run it equally often.

    What is around the blocks is on the device already; `bring(name)` brings a block there. `forward()` runs the network once: parts of
    blocks that are called while their block does not run, as in DiT, are seen and become groups of their own. Afterwards the modules have
    the tensors that they had before.
    """
    mesh = DeviceMesh(device.type, range(group_size()))
    with _in_groups(module, blocks, mesh, bring):
        apart = _called_apart(blocks.values(), forward)
    with _in_groups(module, blocks, mesh, bring, apart):
        yield


@contextmanager
def _in_groups(
    module: nn.Module, blocks: Mapping[str, nn.Module], mesh: DeviceMesh, bring: Callable[[str], None], apart: Sequence[nn.Module] = ()
) -> Iterator[None]:
    with _as_before(module):
        for name, block in blocks.items():
            bring(name)
            _detach_tensors(block)
            for part in (part for part in block.modules() if part in apart):
                _shard(part, mesh)
            _shard(block, mesh)
        _detach_tensors(module)
        _shard(module, mesh)
        yield


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, ignored_params={parameter for parameter in module.parameters() if parameter.ndim == 0})


def _detach_tensors(module: nn.Module) -> None:
    """Give a module parameters and buffers of its own with the same values: FSDP2 changes those that it finds."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, found in part._parameters.items():
            if found is not None and not hasattr(found, "device_mesh"):
                made.setdefault(id(found), nn.Parameter(found.detach().contiguous(), found.requires_grad))
                part._parameters[name] = made[id(found)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.detach()


def _called_apart(blocks: Iterator[nn.Module] | Any, forward: Callable[[], Any]) -> list[nn.Module]:
    """Return the parts of blocks that a forward calls while their block does not run; their block is made whole for them."""
    running: set[nn.Module] = set()
    apart: dict[nn.Module, None] = {}

    def start(block: nn.Module, _: Any) -> None:
        running.add(block)

    def end(block: nn.Module, *_: Any) -> None:
        running.discard(block)

    def see(block: nn.Module) -> Callable[[nn.Module, Any], None]:
        def hook(part: nn.Module, _: Any) -> None:
            if block not in running:
                assert isinstance(block, FSDPModule)
                block.unshard()
                apart[part] = None

        return hook

    handles = []
    for block in blocks:
        handles += [block.register_forward_pre_hook(start), block.register_forward_hook(end)]
        handles += [part.register_forward_pre_hook(see(block)) for part in block.modules() if part is not block]
    with temporary_hooks(handles), torch.no_grad():
        forward()
    inside = {part for outer in apart for part in outer.modules() if part is not outer}
    return [part for part in apart if part not in inside]


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Put back, afterwards, the class, tensors and hooks of every module."""
    with ExitStack() as stack:
        for part in module.modules():
            contents = [(held, dict(held)) for name in _OWN if isinstance(held := vars(part).get(name), dict)]
            stack.callback(_restore, part, type(part), frozenset(vars(part)), contents)
        yield


def _restore(part: nn.Module, kind: type, names: frozenset[str], contents: Sequence[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    part.__class__ = kind
    for name in vars(part).keys() - names:
        del vars(part)[name]
    for held, then in contents:
        held.clear()
        held.update(then)
    _module_state_mapping.pop(part, None)  # else FSDP2 would refuse to shard the module once more
