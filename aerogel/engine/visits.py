"""Visits of block methods to a block; what a method did by halves is undone when the device had too little memory for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from aerogel.layers.linear import QuantLinear
from aerogel.layers.scaled_input import ScaledInput
from aerogel.methods.base import BlockMethod
from aerogel.model.block import Block
from aerogel.model.placement import HOST
from aerogel.recipe import Step


def compress_block(block: Block, step: Step) -> None:
    """Let a block method change a block; its notes get the name of the step and the scheme of the layer."""
    assert isinstance(step.method, BlockMethod)
    before = len(block.notes)
    block.outputs = None  # of the step before
    with torch.set_grad_enabled("gradients" in step.method.requires):
        step.method.compress(block)
    block.notes[before:] = [
        {"block": block.name, "method": step.name, **_scheme_of(block, note["name"]), **note} for note in block.notes[before:]
    ]


def _scheme_of(block: Block, name: str) -> dict[str, str]:
    """Return the scheme of a part of the block, if it is quantized by now; a note may also be of a parameter, which has none."""
    if name in block.parameters:
        return {}
    part = block.module.get_submodule(name.removeprefix(f"{block.name}."))
    part = part.inner if isinstance(part, ScaledInput) else part
    return {"scheme": str(part.scheme)} if isinstance(part, QuantLinear) else {}


def before_again(block: Block, targets: Callable[[Block], None] | None = None) -> Callable[[], None]:
    """Return what to do before steps visit a block once more: it is as it is now, and its `targets` are of the calls as they are then.

    The CPU never runs out of memory in a way that one could go on after, so nothing is kept for it.
    """
    state = _BlockState(block) if block.network.placement.on_accelerator else None

    def again() -> None:
        if state is not None:
            state.restore()
        if targets is not None:
            targets(block)

    return again


class _BlockState:
    """Structure, values and notes of a block before a visit, its values on the host."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._parts = [(part, dict(part._modules), dict(part._parameters), dict(part._buffers)) for part in _parts(block)]
        tensors = [tensor for _, _, parameters, buffers in self._parts for tensor in (*parameters.values(), *buffers.values())]
        self._values: dict[int, tuple[Tensor, Tensor]] = {
            id(tensor): (tensor, tensor.detach().to(HOST, copy=True)) for tensor in tensors if tensor is not None and not tensor.is_meta
        }
        self._notes = len(block.notes)
        self._pruned = set(block.network.pruned)
        self._parameters = dict(block.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for part, modules, parameters, buffers in self._parts:
            for places, before in ((part._modules, modules), (part._parameters, parameters), (part._buffers, buffers)):
                places.clear()
                places.update(before)  # type: ignore[arg-type]
        for tensor, value in self._values.values():
            tensor.copy_(value)
        block = self._block
        block.outputs = None
        del block.notes[self._notes :]
        block.network.pruned.intersection_update(self._pruned)
        block.parameters.update(self._parameters)


def _parts(block: Block) -> Iterator[nn.Module]:
    """The modules of a block; of the network around its blocks those that are in none."""
    inside = tuple(f"{name}." for name in block.network.blocks()) if not block.name else ()
    names = () if block.name else block.network.blocks().keys()
    for name, part in block.module.named_modules():
        if name not in names and not name.startswith(inside):
            yield part
