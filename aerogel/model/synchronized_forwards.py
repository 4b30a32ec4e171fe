"""All calls of a block in step: every forward pauses at the next group of inputs until all calls have reached it.

At each group the inputs of all calls can be seen and the group's modules replaced; the forwards then continue through the new modules,
so one forward for each call is enough whatever the number of groups. A forward that pauses is a greenlet. Starting every forward anew
for each group needs none, but takes 2.1 times as long in all of GPTQ, and 1.6 times with 360 MB more where outputs of finished layers
are kept for it (SmolLM2-135M, 16 calls of 4,096 tokens). Threads keep a heap each: over 100 MB more.
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

InputGroup = tuple[str, ...]
"""Names of modules that get the same tensor, relative to the block."""


def synchronized_forwards(
    block: Block, groups: Sequence[InputGroup], see: Callable[[InputGroup, Tensor], None], change: Callable[[InputGroup], None]
) -> list[Any]:
    """Run the block's calls through all groups and return their outputs.

    `see` is given each call's input to a group; when all calls are there, `change(group)` may replace the group's modules, and the calls
    continue through the new ones. The groups are in the order in which they run. Raises AerogelError when a call has another order,
    leaves a group out, or gives the modules of a group different tensors; the block is then half changed.
    """
    with _started(block, groups) as forwards:
        for group in groups:
            for forward in forwards.each:
                see(group, forwards.run_to(forward, group))
            forwards.drop_dequantized()
            change(group)
            forwards.let_pass(group)
        return [block.network.placement.take_back(forwards.finish(forward)) for forward in forwards.each]


class _Forward:
    """One call's forward, which runs only while `run` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._greenlet = greenlet(work, parent=getcurrent())
        self.output: Any = None
        self.group: InputGroup | None = None
        """The group at which it paused last."""
        self.x: Tensor | None = None
        """The group's input."""

    @property
    def finished(self) -> bool:
        """True once it came to its end."""
        return self._greenlet.dead

    def run(self) -> None:
        """Let it run until it pauses again or ends; raises what it raised."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # inside it is the forward's own affair
            self.output = self._greenlet.switch()

    def pause(self, group: InputGroup, x: Tensor) -> None:
        """Return to the caller of `run` until it runs this forward again; called from inside."""
        self.group, self.x = group, x
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            self._greenlet.parent.switch()

    def abort(self) -> None:
        """End it where it paused."""
        if self._greenlet:
            stop = Stop()
            with until(stop):
                self._greenlet.throw(stop)
        self.x = None


class _Forwards:
    """The forwards of all calls and the groups at which they still pause."""

    def __init__(self, block: Block, groups: Sequence[InputGroup], stack: ExitStack) -> None:
        self._block, self._stack = block, stack
        self._dequantized = stack.enter_context(ExitStack())
        self._group_of = {name: group for group in groups for name in group}
        self.running: _Forward | None = None
        self.each = [_Forward(self._work(call)) for call in block.calls]

    def _work(self, call: Call) -> Callable[[], Any]:
        return lambda: self._block.run(call)

    def run_to(self, forward: _Forward, group: InputGroup) -> Tensor:
        """Let a forward run to this group; returns the group's input."""
        self._run(forward)
        if forward.finished or forward.group != group or forward.x is None:
            where = "ends" if forward.finished else f"comes to {forward.group}"
            raise AerogelError(f"{self._block.name}: a call {where} where others come to {group}; set true_sequential: false")
        return forward.x

    def finish(self, forward: _Forward) -> Any:
        """Let a forward run to its end; returns its output."""
        self._run(forward)
        if not forward.finished:
            raise AerogelError(f"{self._block.name}: a call comes to {forward.group} again; set true_sequential: false")
        output, forward.output, forward.x = forward.output, None, None
        return output

    def drop_dequantized(self) -> None:
        """Free the float weights of layers that all forwards have passed by now."""
        self._dequantized.close()

    def let_pass(self, group: InputGroup) -> None:
        """Pause no longer at this group, but check that its modules are given the tensor that was seen."""
        for name in group:
            del self._group_of[name]
        parts = {name: self._block.module.get_submodule(name) for name in group}
        self._stack.enter_context(capture_inputs(parts, self._check))
        self._dequantized.enter_context(cache_dequantized(self._block.module))

    def pausing(self) -> Mapping[nn.Module, Callable[[Tensor], Any]]:
        """Return forwards that pause, for the modules of all groups as they are before any change."""
        modules = {name: self._block.module.get_submodule(name) for name in self._group_of}
        return {module: self._pausing(name, module) for name, module in modules.items()}

    def _pausing(self, name: str, before: nn.Module) -> Callable[[Tensor], Any]:
        def forward(input: Tensor) -> Any:  # noqa: A002 - code of models may give it by the name that nn.Linear has
            if name in self._group_of and self.running is not None:
                self.running.pause(self._group_of[name], input)
            now = self._block.module.get_submodule(name)
            return type(now).forward(now, input) if now is before else now(input)

        return forward

    def _run(self, forward: _Forward) -> None:
        self.running = forward
        forward.run()

    def _check(self, name: str, x: Tensor) -> None:
        if self.running is not None and x is not self.running.x:
            raise AerogelError(f"{self._block.full_name(name)} shares its input in some calls only; set true_sequential: false")


@contextmanager
def _started(block: Block, groups: Sequence[InputGroup]) -> Iterator[_Forwards]:
    with ExitStack() as stack:
        forwards = _Forwards(block, groups, stack)
        stack.enter_context(patch_forward(forwards.pausing()))
        try:
            yield forwards
        finally:
            for forward in forwards.each:
                forward.abort()
            # They refer to each other: a cycle that would keep every call's inputs until the collector runs.
            forwards.each.clear()
            forwards.running = None
