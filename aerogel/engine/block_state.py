"""The state of a block before its visit, on the host: what a method did by halves is undone when the device had too little memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aerogel.model.block import Block
from aerogel.model.placement import HOST


class BlockState:
    """Structure, values and notes of a block, to be put back."""

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
