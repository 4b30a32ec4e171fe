"""All calls of a block side by side: each forward goes on to the next gate and waits there until all have come.

What is done at a gate can so look at what all calls bring there and change the modules they go on through, and one forward for each
call is enough however many gates there are. Every forward is a greenlet: it runs until it switches back, in the caller's own thread, so
that device, stream and heap are the caller's too (threads would each keep a heap of what they freed: over 100 MB, measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, capture_inputs, patch_forward, until

Gate = tuple[str, ...]
"""Names of modules that get the same tensor, relative to the block."""


def lockstep(block: Block, gates: Sequence[Gate], see: Callable[[Gate, Tensor], None], change: Callable[[Gate], None]) -> list[Any]:
    """Run the block's calls through all gates and return their outputs.

    `see` is given what each call brings to a gate; when all have come, `change(gate)` may replace the gate's modules, and the calls go
    on through the new ones. The gates are in the order in which they are reached. Raises AerogelError when a call keeps another order,
    leaves one out, or gives the modules of a gate different tensors; the block is then half changed.
    """
    with _forwards(block, gates) as march:
        for gate in gates:
            for forward in march.forwards:
                see(gate, march.to(forward, gate))
            march.rest()
            change(gate)
            march.open(gate)
        return [march.to_the_end(forward) for forward in march.forwards]


class _Forward:
    """One call's forward, which runs only while `go_on` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._running = greenlet(work, parent=getcurrent())
        self.output: Any = None
        self.gate: Gate | None = None
        self.x: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return self._running.dead

    def go_on(self) -> None:
        """Let it run until it waits again or ends; raises what it raised."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # inside it is the forward's own affair
            self.output = self._running.switch()

    def wait_at(self, gate: Gate, x: Tensor) -> None:
        """Called from inside: stand at a gate until `go_on`."""
        self.gate, self.x = gate, x
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            self._running.parent.switch()

    def abandon(self) -> None:
        """End it wherever it stands."""
        if self._running:
            stop = Stop()
            with until(stop):
                self._running.throw(stop)
        self.x = None


class _March:
    """The forwards of all calls and the gates they have still to pass."""

    def __init__(self, block: Block, gates: Sequence[Gate], stack: ExitStack) -> None:
        self._block, self._stack = block, stack
        self._held = stack.enter_context(ExitStack())
        self._ahead = {name: gate for gate in gates for name in gate}
        self.running: _Forward | None = None
        self.forwards = [_Forward(self._work(call)) for call in block.calls]

    def _work(self, call: Call) -> Callable[[], Any]:
        return lambda: self._block.run(call)

    def to(self, forward: _Forward, gate: Gate) -> Tensor:
        """Let a forward run to this gate; returns what it brings."""
        self._go(forward)
        if forward.done or forward.gate != gate or forward.x is None:
            where = "ends" if forward.done else f"comes to {forward.gate}"
            raise AerogelError(f"{self._block.name}: a call {where} where others come to {gate}; set true_sequential: false")
        return forward.x

    def to_the_end(self, forward: _Forward) -> Any:
        """Let a forward run to its end; returns its output."""
        self._go(forward)
        if not forward.done:
            raise AerogelError(f"{self._block.name}: a call comes to {forward.gate} again; set true_sequential: false")
        output, forward.output, forward.x = forward.output, None, None
        return output

    def rest(self) -> None:
        """All stand at one gate: float weights that were held between the gate before and this one can go."""
        self._held.close()

    def open(self, gate: Gate) -> None:
        """Let nobody wait at this gate any more, but make sure that its modules are given the tensor that was seen."""
        for name in gate:
            del self._ahead[name]
        parts = {name: self._block.module.get_submodule(name) for name in gate}
        self._stack.enter_context(capture_inputs(parts, self._check))
        self._held.enter_context(cache_dequantized(self._block.module))

    def answers(self) -> Mapping[Any, Callable[[Tensor], Any]]:
        """Forwards that wait, for the modules of all gates as they are before."""
        modules = {name: self._block.module.get_submodule(name) for name in self._ahead}
        return {module: self._answer(name, module) for name, module in modules.items()}

    def _answer(self, name: str, before: nn.Module) -> Callable[[Tensor], Any]:
        def forward(x: Tensor) -> Any:
            if name in self._ahead and self.running is not None:
                self.running.wait_at(self._ahead[name], x)
            now = self._block.module.get_submodule(name)
            return type(now).forward(now, x) if now is before else now(x)

        return forward

    def _go(self, forward: _Forward) -> None:
        self.running = forward
        forward.go_on()

    def _check(self, name: str, x: Tensor) -> None:
        if self.running is not None and x is not self.running.x:
            raise AerogelError(f"{self._block.full_name(name)} shares its input in some calls only; set true_sequential: false")


@contextmanager
def _forwards(block: Block, gates: Sequence[Gate]) -> Iterator[_March]:
    with ExitStack() as stack:
        march = _March(block, gates, stack)
        stack.enter_context(patch_forward(march.answers()))
        try:
            yield march
        finally:
            for forward in march.forwards:
                forward.abandon()
            # They know the march: a circle that would keep every call's inputs until the collector runs.
            march.forwards.clear()
            march.running = None
