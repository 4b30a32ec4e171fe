"""The walk: block after block through any network, each with the inputs it gets from what was done to those before.

The network's own forward runs everything between blocks. Blocks behind answer with the outputs they gave, the block ahead hands over
its inputs and stops the forward; so nothing here knows what blocks take or return, or what stands between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.activations import Activations
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, patch_forward, until
from aerogel.model.network import Network
from aerogel.model.trace import NON_BLOCK, trace


def blocks_of(network: Network) -> Iterator[Block]:
    """Every block without calls, in list order; the network around its blocks, named '', comes last."""
    modules = {**network.blocks(), NON_BLOCK: network.module}
    for position, (name, module) in enumerate(modules.items()):
        yield Block(name, module, position, len(modules), (), network)


class Residency(Protocol):
    """Brings a block's weights in for its visit and lets them go afterwards."""

    def enter(self, name: str) -> None:
        """Make the weights of this block resident."""

    def release(self, name: str) -> None:
        """Let the weights of this block go."""


class _AlwaysResident:
    def enter(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass


class Walk:
    """Visits the blocks in execution order; iterate over it and change each block while it is in hand.

    With a `folder`, outputs of blocks live there, the position is committed after every block, and a new walk over the same
    folder goes on where the last one ended. `finished(block)` is called when the outputs of a block are computed and before
    its weights are released and the position is committed. With `around`, the network around its blocks comes last, as a block named ''.
    """

    def __init__(
        self,
        network: Network,
        calls: Sequence[Call],
        *,
        residency: Residency | None = None,
        folder: Path | None = None,
        finished: Callable[[Block], None] | None = None,
        around: bool = False,
    ) -> None:
        if not calls:
            raise AerogelError("a walk needs at least one call; give calibration samples")
        self._network = network
        self._calls = calls
        self._residency = residency or _AlwaysResident()
        self._folder = folder
        self._finished = finished or (lambda block: None)
        self._around = around
        self._outputs = Activations(folder / "activations" if folder else None)
        self._modules = network.blocks()
        self.route = trace(network, calls, self._visiting)
        self.position = self._committed_position()

    @property
    def order(self) -> tuple[str, ...]:
        """Full names of the blocks in execution order."""
        return self.route.order

    def __len__(self) -> int:
        return len(self.order) + self._around

    def __iter__(self) -> Iterator[Block]:
        for position in range(self.position, len(self.order)):
            name = self.order[position]
            with self._visiting(name):
                block = self._block(name, position)
                yield block
                with cache_dequantized(block.module):
                    for number, (index, call) in enumerate(self._inputs(name)):
                        self._outputs.put(name, index, block.outputs[number] if block.outputs else block.run(call))
                block.outputs = None
                self._finished(block)
            self._advance(position)
        if self._around:
            block = self._block(NON_BLOCK, len(self.order))
            yield block
            self._finished(block)

    def _block(self, name: str, position: int) -> Block:
        module = self._modules[name] if name else self._network.module
        return Block(name, module, position, len(self), _Inputs(self, name), self._network)

    def _inputs(self, name: str) -> Iterator[tuple[int, Call]]:
        """The calls of this block with their numbers; calls that do not reach it are left out."""
        for index, call in enumerate(self._calls):
            if name == NON_BLOCK:
                with patch_forward(self._answers(index)):
                    yield index, call
            elif (inputs := self._inputs_of(name, index)) is not None:
                yield index, inputs

    def _inputs_of(self, name: str, index: int) -> Call | None:
        stop = Stop()
        caught: list[Call] = []

        def hand_over(*args: Any, **kwargs: Any) -> None:
            caught.append(Call(args, kwargs))
            raise stop

        def too_far(*args: Any, **kwargs: Any) -> None:
            raise stop

        # A call that comes to a later block passes this one by; the later one's weights may not be here.
        later = {self._modules[other]: too_far for other in self.order[self.order.index(name) + 1 :]}
        with until(stop), patch_forward({**self._answers(index), **later, self._modules[name]: hand_over}):
            self._network.run(self._calls[index])
        return caught[0] if caught else None

    def _answers(self, index: int) -> dict[nn.Module, Callable[..., Any]]:
        """Return the outputs that finished blocks give in this call."""

        def answer_of(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._outputs.get(name, index)

        return {self._modules[name]: answer_of(name) for name in self.order[: self.position]}

    @contextmanager
    def _visiting(self, name: str) -> Iterator[None]:
        self._residency.enter(name)
        try:
            yield
        finally:
            self._residency.release(name)

    def _advance(self, position: int) -> None:
        """Commit a finished block, then let outputs fade that nobody reads any more."""
        self.position = position + 1
        needed = self.route.needed_after(position)
        self._commit()
        for name in self.order[: self.position]:
            if name not in needed:
                self._outputs.fade(name, len(self._calls))

    def _committed_position(self) -> int:
        path = self._folder / "walk.json" if self._folder else None
        if path is None or not path.exists():
            return 0
        state = json.loads(path.read_text())
        if state["order"] != list(self.order):
            raise AerogelError(f"{path} belongs to a walk over other blocks; remove its folder to start anew")
        return int(state["position"])

    def _commit(self) -> None:
        if self._folder is None:
            return
        state = {"order": list(self.order), "position": self.position}
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = self._folder / "walk.json.new"
        with beside.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._folder / "walk.json")


class _Inputs:
    """The inputs of one block, computed anew on every pass."""

    def __init__(self, walk: Walk, name: str) -> None:
        self._walk = walk
        self._name = name

    def __iter__(self) -> Iterator[Call]:
        return (call for _, call in self._walk._inputs(self._name))

    def __len__(self) -> int:
        return len(self._walk._calls)
