"""The walk: block after block through any network, each with the inputs it gets from what was done to those before.

The network's own forward runs everything between blocks. Blocks behind answer with the outputs they gave, the block ahead hands over
its inputs and stops the forward; so nothing here knows what blocks take or return, or what stands between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.activations import Activations
from aerogel.model.batches import Batches, Part, joined
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, patch_forward, until
from aerogel.model.network import Network
from aerogel.model.overflow import require_finite
from aerogel.model.processes import ALONE, Processes
from aerogel.model.shared_entries import Watched, mappings_in, write
from aerogel.model.trace import NON_BLOCK, Route, trace


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


class InMemory:
    """Moves the blocks of a network that is in memory to the computing device and back; where they rest there, nothing moves."""

    def __init__(self, network: Network) -> None:
        self._placement, self._blocks = network.placement, network.blocks()

    def enter(self, name: str) -> None:
        """Bring a block's weights to the computing device."""
        if self._placement.moves_weights:
            self._placement.bring_weights(self._blocks[name])

    def release(self, name: str) -> None:
        """Return a block's weights to where they rest."""
        if self._placement.moves_weights:
            self._placement.return_weights(self._blocks[name])


class Walk:
    """Visits the blocks in execution order; iterate over it and change each block while it is in hand.

    With a `folder`, outputs of blocks live there, the position is committed after every block, and a new walk over the same
    folder goes on where the last one ended. `finished(block)` is called when the outputs of a block are computed and before
    its weights are released and the position is committed. With `around`, the network around its blocks comes last, as a block named ''.
    Calls and outputs are kept on the host; one block and one call at a time are on the computing device, which `batches` halves when its
    memory does not suffice.

    Several `processes` visit the same blocks together, each with its part of the calls unless `shares_calls` is False, and with a folder
    of its own. They go on from the farthest position of all: none passes a block before all have its outputs.
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
        batches: Batches | None = None,
        processes: Processes = ALONE,
        shares_calls: bool = True,
    ) -> None:
        if not calls:
            raise AerogelError("a walk needs at least one call; give calibration samples")
        self._processes = processes if shares_calls else ALONE
        self._network = network
        self._calls = calls
        self._residency = residency or InMemory(network)
        self._batches = batches or Batches(network.placement)
        self._folder = folder
        self._finished = finished or (lambda block: None)
        self.around = around
        self._outputs = Activations(folder / "activations" if folder else None, network.placement)
        self._modules = network.blocks()
        self._one_sample_shows_the_way = True
        with network.glue_on_device():
            # Of all calls: every process has to visit the same blocks.
            self.route = self._batches.fit(self._traced)
        self.position = max(processes.gather(self._committed_position()))

    @property
    def order(self) -> tuple[str, ...]:
        """Full names of the blocks in execution order."""
        return self.route.order

    def __len__(self) -> int:
        return len(self.order) + self.around

    def __iter__(self) -> Iterator[Block]:
        with self._network.glue_on_device():
            for position in range(self.position, len(self.order)):
                name = self.order[position]
                with self._visiting(name):
                    block = self._block(name, position)
                    yield block
                    self._batches.fit(
                        lambda block=block: self._keep_outputs(block),  # type: ignore[misc]
                        lambda block=block: self._drop_outputs(block),  # type: ignore[misc]
                        self._processes,
                    )
                    block.outputs = None
                    self._finished(block)
                self._advance(position)
            if self.around:
                block = self._block(NON_BLOCK, len(self.order))
                yield block
                self._finished(block)

    def _traced(self) -> Route:
        if self._one_sample_shows_the_way:
            try:
                return trace(self._network, self._first_parts(), self._visiting)
            except (AerogelError, torch.OutOfMemoryError):
                raise
            except Exception:  # noqa: BLE001  whatever a model raises that takes several rows for one sample, as Musicgen does
                self._one_sample_shows_the_way = False
        return trace(self._network, self._first_parts(), self._visiting)

    def _first_parts(self) -> list[Call]:
        return [part.call(self._calls[part.call_index]) for part in self._one_row_each(range(len(self._calls)))]

    def _one_row_each(self, numbers: Iterable[int]) -> Iterator[Part]:
        """The first sample of every call of tokens: which way a call takes does not depend on how many it has."""
        first = self._batches.first_sample if self._one_sample_shows_the_way else lambda *of: next(self._batches.parts(*of))
        return (first(number, self._calls[number]) for number in numbers)

    def _mine(self) -> range:
        """Numbers of the calls of this process, whose outputs it keeps."""
        return self._processes.share(len(self._calls))

    def _keep_outputs(self, block: Block) -> None:
        """Store what the block gives for each call, put together from its parts."""
        parts: list[Part] = []
        outputs: list[Any] = []
        with cache_dequantized(block.module):
            for number, (part, call) in enumerate(self._inputs(block.name)):
                parts.append(part)
                answer = self._answer(block, number, call)
                require_finite(block.name, block.module, call, answer["output"])
                outputs.append(self._network.placement.take_back(answer))
                if part.last:
                    self._outputs.put(block.name, part.call_index, joined(parts, outputs))
                    parts, outputs = [], []

    @staticmethod
    def _answer(block: Block, number: int, call: Call) -> dict[str, Any]:
        """Return the output of a block, and what it writes for later blocks; where it might, an output alone is not enough."""
        if block.outputs and not mappings_in(call.args, call.kwargs):
            return {"output": block.outputs[number], "written": []}
        with Watched(call.args, call.kwargs) as watched:
            output = block.run(call)
        return {"output": output, "written": watched.written}

    @staticmethod
    def _drop_outputs(block: Block) -> None:
        block.outputs = None  # they are of calls that were halved less often

    def _block(self, name: str, position: int) -> Block:
        module = self._modules[name] if name else self._network.module
        inputs, first = _Inputs(self, name), _FirstRows(self, name)
        return Block(name, module, position, len(self), inputs, self._network, processes=self._processes, one_row_each=first)

    def _parts(self) -> Iterator[Part]:
        return (part for index in self._mine() for part in self._batches.parts(index, self._calls[index]))

    def _inputs(self, name: str, parts: Iterable[Part] | None = None) -> Iterator[tuple[Part, Call]]:
        """The parts of calls that reach this block, by default of all calls, with its inputs on the computing device."""
        for part in self._parts() if parts is None else parts:
            if name == NON_BLOCK:
                with patch_forward(self._answers(part)):
                    yield part, self._network.placement.bring_calls([part.call(self._calls[part.call_index])])[0]
            elif (inputs := self._inputs_of(name, part)) is not None:
                yield part, inputs

    def _inputs_of(self, name: str, part: Part) -> Call | None:
        stop = Stop()
        caught: list[Call] = []

        def hand_over(*args: Any, **kwargs: Any) -> None:
            caught.append(Call(args, kwargs))
            raise stop

        def too_far(*args: Any, **kwargs: Any) -> None:
            raise stop

        # A call that comes to a later block passes this one by; the later one's weights may not be here.
        later = {self._modules[other]: too_far for other in self.order[self.order.index(name) + 1 :]}
        with until(stop), patch_forward({**self._answers(part), **later, self._modules[name]: hand_over}):
            self._network.run(part.call(self._calls[part.call_index]))
        return caught[0] if caught else None

    def _answers(self, part: Part) -> dict[nn.Module, Callable[..., Any]]:
        """Return the outputs that finished blocks give in this part of a call."""

        def answer_of(name: str) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                found = self._outputs.get(name, part.call_index, part.of)
                write(found["written"], args, kwargs)
                return found["output"]

            return answer

        return {self._modules[name]: answer_of(name) for name in self.order[: self.position]}

    @contextmanager
    def _visiting(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._residency.release, name)  # also when the memory ends while it comes in
            self._residency.enter(name)
            yield

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
        try:
            state = json.loads(path.read_text())
            order, position = state["order"], int(state["position"])
        except (ValueError, TypeError, KeyError) as error:
            raise AerogelError(f"{path} is damaged; remove the progress folder to start again") from error
        if order != list(self.order) or not 0 <= position <= len(order):
            raise AerogelError(f"{path} belongs to a walk over other blocks; remove the progress folder to start again")
        return position

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
        return sum(1 for _ in self._walk._parts())


class _FirstRows(_Inputs):
    """The inputs of one block for the first sample of every call of tokens."""

    def __iter__(self) -> Iterator[Call]:
        return (call for _, call in self._walk._inputs(self._name, self._walk._one_row_each(self._walk._mine())))

    def __len__(self) -> int:
        return len(self._walk._mine())
