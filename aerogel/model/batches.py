"""Parts of calls: where a call does not fit into a device's memory, halves of its batch run one by one and their outputs are put together.

A part is a run of rows of a call's batch. All calls of a run are halved equally often, and what is kept of a call is always the whole of
it, so that statistics, stored outputs and resumed runs are the same however often calls were halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.model.calls import Call, map_tensors, tensors_in
from aerogel.model.placement import Placement
from aerogel.model.processes import ALONE, OtherOutOfMemoryError, Processes

Result = TypeVar("Result")

_TOKEN_INPUTS = ("input_ids", "inputs_embeds")


class Part(NamedTuple):
    """Some rows of a call's batch."""

    call_index: int
    """Number of the call."""
    start: int
    stop: int
    rows: int
    """Rows of the whole batch; 1 for a call that cannot be taken apart."""

    @property
    def whole(self) -> bool:
        """True where it is the whole call."""
        return self.stop - self.start == self.rows

    @property
    def last(self) -> bool:
        """True for the last part of a call."""
        return self.stop == self.rows

    def of(self, tree: Any) -> Any:
        """Return these rows of nested tensors; a tensor without a row for each sample is shared by all parts."""
        if self.whole:
            return tree
        return map_tensors(lambda x: x[self.start : self.stop] if x.ndim and len(x) == self.rows else x, tree)

    def call(self, call: Call) -> Call:
        """Return these rows of the call."""
        return Call(*self.of((call.args, call.kwargs)))


@dataclass
class Batches:
    """How often the calls of a run have been halved by now."""

    placement: Placement
    halvings: int = 0
    most_rows: int = field(default=0, init=False)
    """Rows of the largest call that can be taken apart."""

    @property
    def told(self) -> str:
        """Return what happened, for the report."""
        return f"calls of the calibration ran in up to {2**self.halvings} parts, because {self.placement.device} had too little memory"

    def parts(self, index: int, call: Call) -> Iterator[Part]:
        """Yield the parts of a call, in order."""
        rows = batch_rows(call)
        self.most_rows = max(self.most_rows, rows)
        spans = [(0, rows)]
        for _ in range(self.halvings):
            spans = [half for start, stop in spans for half in _halves(start, stop)]
        for start, stop in spans:
            yield Part(index, start, stop, rows)

    def first_sample(self, index: int, call: Call) -> Part:
        """Return the first sample of a call of tokens alone, else the first part: inside, images may have rows of another kind."""
        part = next(self.parts(index, call))
        return part if any(tensor.is_floating_point() for tensor in tensors_in((call.args, call.kwargs))) else part._replace(stop=1)

    def fit(self, work: Callable[[], Result], before_again: Callable[[], None] = lambda: None, processes: Processes = ALONE) -> Result:
        """Do some work; where the device has too little memory for it, halve all calls and do it again after `before_again`.

        Where `processes` do the work together, all of them do it again. Raises AerogelError where a call of one sample is too large.
        """
        while True:
            try:
                result = work()
                processes.wait()
                return result
            except torch.OutOfMemoryError as error:
                if not isinstance(error, OtherOutOfMemoryError):
                    processes.ask_again()
                reason = str(error).strip().partition("\n")[0]
            self._halve(reason)
            before_again()

    def _halve(self, reason: str) -> None:
        self.placement.release_memory()
        if 2**self.halvings >= self.most_rows:
            raise AerogelError(
                f"{self.placement.device} has too little memory for one sample at a time ({reason}); give shorter samples, a smaller "
                "`batch` to a method that has one, another device, or device cpu"
            )
        self.halvings += 1


def batch_rows(call: Call) -> int:
    """Return the samples of a call that can be taken apart, and 1 for one that cannot.

    Every tensor of tokens must have a row for each sample: image patches in one row cannot be told apart. A denoiser's calls may have
    tensors that all samples share, such as positions.
    """
    tensors = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.ndim]
    if not tensors:
        return 1
    tokens = _tokens_of(call)
    rows = len(tensors[0] if tokens is None else tokens)
    return 1 if tokens is not None and any(len(tensor) != rows for tensor in tensors) else rows


def _tokens_of(call: Call) -> Tensor | None:
    """Return the tensor of tokens, which has a row for each sample; None in a call that has no tokens."""
    named = next((call.kwargs[name] for name in _TOKEN_INPUTS if isinstance(call.kwargs.get(name), Tensor)), None)
    first = next((tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.ndim), None)
    return named if named is not None or first is None or first.is_floating_point() else first


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    middle = (start + stop + 1) // 2
    return [(start, middle), (middle, stop)] if middle < stop else [(start, stop)]


def joined(parts: Sequence[Part], outputs: Sequence[Any]) -> Any:
    """Put the outputs of all parts of a call together.

    Raises AerogelError where they are no rows of one output.
    """
    if len(outputs) == 1:
        return outputs[0]
    flat = [pytree.tree_flatten(output) for output in outputs]
    leaves = [_joined(parts, places) for places in zip(*(found for found, _ in flat), strict=True)]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _joined(parts: Sequence[Part], leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if not isinstance(first, Tensor):
        return first
    if first.ndim and all(len(leaf) == part.stop - part.start for leaf, part in zip(leaves, parts, strict=True)):
        return torch.cat(list(leaves))
    if all(torch.equal(leaf, first) for leaf in leaves):
        return first
    raise AerogelError(
        f"a call cannot be taken apart: its parts give {[tuple(leaf.shape) for leaf in leaves]}; give a smaller batch_size, or device cpu"
    )
