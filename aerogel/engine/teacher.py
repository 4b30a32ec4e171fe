"""The teacher: the network before any step, walked beside the one that is compressed, for methods that fit blocks to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Checkpoint
from aerogel.model.batches import Batches
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.overflow import require_finite
from aerogel.model.placement import HOST, Placement
from aerogel.model.walk import InMemory, Residency, Walk


def teacher_of(network: Network) -> Network:
    """Return a network that stays as `network` is now: a copy of what is in memory, or the folder opened again.

    The copy of a network on an accelerator rests on the host.
    """
    if network.checkpoint is not None:
        floats = network.dequantized is not None
        return open_model(network.source or network.origin, device=network.device, dequantize=floats)
    on_host: dict[int, Any] = {}
    if network.placement.on_accelerator:
        for tensor in (*network.module.parameters(), *network.module.buffers()):
            made = tensor.detach().to(HOST, copy=True)
            on_host[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    module = copy.deepcopy(network.module, on_host)
    placed = Placement(network.device, HOST) if network.placement.on_accelerator else network.placed
    return replace(network, module=module, processor=None, placed=placed)


class _FromFolder:
    """Brings the teacher's blocks in from its folder for their visit."""

    def __init__(self, teacher: Network, checkpoint: Checkpoint) -> None:
        self._device, self._checkpoint, self._blocks = teacher.device, checkpoint, teacher.blocks()

    def enter(self, name: str) -> None:
        """Make the weights of this block resident."""
        self._checkpoint.materialise(self._blocks[name], name, device=self._device)

    def release(self, name: str) -> None:
        """Let the weights of this block go."""
        self._checkpoint.release(self._blocks[name])


def residency_of(teacher: Network) -> Residency:
    """Return what brings the teacher's blocks in: from its folder, or from memory."""
    return InMemory(teacher) if teacher.checkpoint is None else _FromFolder(teacher, teacher.checkpoint)


@contextmanager
def resident(teacher: Network | None) -> Iterator[None]:
    """Hold the whole teacher on the computing device for a while, for steps that run it."""
    if teacher is None:
        yield
        return
    residency = residency_of(teacher)
    with teacher.glue_on_device(), ExitStack() as stack:
        for name in teacher.blocks():
            stack.callback(residency.release, name)
            residency.enter(name)
        yield


class TeacherWalk:
    """The blocks of a walk, each with that of the teacher and what it gives as targets; the network around its blocks has no targets."""

    def __init__(self, walk: Walk, teacher: Network, calls: Sequence[Call], folder: Path | None, batches: Batches | None = None) -> None:
        """Raises AerogelError when a folder's two walks do not stand at the same block."""
        self._walk, self._batches = walk, batches or Batches(teacher.placement)
        self._beside = Walk(teacher, calls, residency=residency_of(teacher), folder=folder, around=walk.around, batches=self._batches)
        self._own: Block | None = None
        self._halvings = 0
        if self._beside.order != walk.order or not 0 <= walk.position - self._beside.position <= 1:  # a run may be killed between the two
            raise AerogelError(f"{folder}: the teacher is missing from the unfinished run; remove the run and start again")

    def __iter__(self) -> Iterator[Block]:
        model = iter(self._beside)
        for block in self._walk:
            self._own = self._advance(model, block.position)
            block.targets, block.original = self._own.outputs, self._own
            yield block

    def again(self, block: Block) -> None:
        """Make the targets of a block anew, for calls that were halved since."""
        if block.name and self._own is not None:
            self._answer(self._own)
            block.targets = self._own.outputs

    def _advance(self, model: Iterator[Block], position: int) -> Block:
        if self._own is not None and self._halvings != self._batches.halvings:
            self._answer(self._own)  # calls were halved after the block that was compressed had its targets
        for own in model:
            if own.name:
                self._answer(own)
            if own.position == position:
                return own
        raise AssertionError("both walks visit the same blocks")

    def _answer(self, own: Block) -> None:
        """Run the teacher's block; its outputs are kept on the host."""

        def answer(call: Call) -> Any:
            output = own.run(call)
            require_finite(own.name, own.module, call, output)
            return own.network.placement.take_back(output)

        own.outputs = self._batches.fit(lambda: [answer(call) for call in own.calls])
        self._halvings = self._batches.halvings
