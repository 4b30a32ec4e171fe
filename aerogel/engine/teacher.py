"""The teacher: the network before any step, walked beside the one that is compressed, for methods that fit blocks to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.walk import Walk


def teacher_of(network: Network) -> Network:
    """Return a network that stays as `network` is now: a copy of what is in memory, or the folder opened again."""
    if network.checkpoint is not None:
        return open_model(network.source or network.origin)
    return replace(network, module=copy.deepcopy(network.module), processor=None)


class _Resident:
    """Brings the teacher's blocks in from its folder for their visit."""

    def __init__(self, teacher: Network) -> None:
        self._teacher, self._blocks = teacher, teacher.blocks()

    def enter(self, name: str) -> None:
        """Make the weights of this block resident."""
        if self._teacher.checkpoint is not None:
            self._teacher.checkpoint.materialise(self._blocks[name], name)

    def release(self, name: str) -> None:
        """Let the weights of this block go."""
        if self._teacher.checkpoint is not None:
            self._teacher.checkpoint.release(self._blocks[name])


@contextmanager
def resident(teacher: Network | None) -> Iterator[None]:
    """Hold the whole teacher in memory for a while, for steps that run it."""
    if teacher is None:
        yield
        return
    resident = _Resident(teacher)
    for name in teacher.blocks():
        resident.enter(name)
    try:
        yield
    finally:
        for name in teacher.blocks():
            resident.release(name)


def walk_with_teacher(walk: Walk, teacher: Network, calls: Sequence[Call], folder: Path | None) -> Iterator[Block]:
    """Yield the blocks of a walk with what the teacher's give as their targets; the network around its blocks has none.

    Raises AerogelError when a folder's two walks do not stand at the same block.
    """
    beside = Walk(teacher, calls, residency=_Resident(teacher), folder=folder)
    if beside.order != walk.order or not 0 <= walk.position - beside.position <= 1:  # a run may be killed between the two
        raise AerogelError(f"{folder}: the teacher is missing from the unfinished run; remove the run and start again")
    model = iter(beside)
    for block in walk:
        if block.name:
            block.targets = _targets(model, block.position)
        yield block


def _targets(model: Iterator[Block], position: int) -> list[object]:
    for own in model:
        own.outputs = [own.run(call) for call in own.calls]
        if own.position == position:
            return own.outputs
    raise AssertionError("both walks visit the same blocks")
