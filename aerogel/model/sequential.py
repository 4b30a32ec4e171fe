"""Layers of a block changed in the order in which they run, each with statistics of what it reads once those before it are changed.

That is "true sequential" calibration, as in GPTQ and SparseGPT. Layers that read the same input are changed together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from aerogel.layers.conv import Layer
from aerogel.model.block import Block
from aerogel.model.calls import Call, tensors_in
from aerogel.model.statistics import InputStatistics, collect, sharing, together
from aerogel.model.synchronized_forwards import InputGroup, synchronized_forwards

Change = Callable[[Sequence[str], Mapping[str, InputStatistics]], None]
"""Changes layers of a block, given their names and the statistics of those that tokens reached."""


def change_in_order(
    block: Block,
    linears: Mapping[str, Layer],
    change: Change,
    *,
    ranges: bool = False,
    true_sequential: bool | None = None,
    max_activation_gb: float = 1.0,
) -> None:
    """Collect the Hessians of layers and change them, in the order in which they run where that is wanted.

    With `true_sequential` None they are in order where one pass of all calls is enough, which then holds at most `max_activation_gb`
    gigabytes of activations; True takes a pass for every group of layers above that, and where there are convolutions, whose patches of all
    calls would be too much to hold. `ranges` collects the ranges of inputs too.
    """

    def now(names: Sequence[str]) -> None:
        if names:
            change(names, collect(block, names, moment=True, ranges=ranges))

    if true_sequential is False or not block.name or not linears:
        now(tuple(linears))
        return
    visits = sharing(block, linears)
    input_groups = list(dict.fromkeys(visits))
    stages = stages_of(input_groups)
    missed = set(linears).difference(*input_groups)
    once = len(set().union(*input_groups)) == sum(map(len, visits))
    dense = {name: layer for name, layer in linears.items() if isinstance(layer, nn.Linear)}
    in_step = once and len(stages) == len(input_groups) and not missed and len(dense) == len(linears)
    if in_step and _paused_bytes(block, dense) <= max_activation_gb * 1e9:
        _in_one_pass(block, input_groups, change, ranges)
    elif true_sequential:
        for stage in (*stages, tuple(missed)):
            now([name for name in linears if name in stage])
    else:
        now(tuple(linears))


def stages_of(input_groups: Iterable[InputGroup]) -> list[InputGroup]:
    """Layers that are changed together, in the order in which they run; the like layers of all experts are one stage."""
    stages: dict[tuple[str, ...], list[str]] = {}
    for names in input_groups:
        stages.setdefault(tuple(re.sub(r"\d+", "*", name) for name in names), []).extend(names)
    return [tuple(stage) for stage in stages.values()]


def _in_one_pass(block: Block, input_groups: Sequence[InputGroup], change: Change, ranges: bool) -> None:
    """One forward for each call, all of them paused at every input group until its layers are changed."""
    seen: dict[InputGroup, InputStatistics] = {}

    def see(names: InputGroup, x: Tensor) -> None:
        if names not in seen:
            seen[names] = InputStatistics(x.shape[-1], x.device, moment=True, ranges=ranges, name=block.full_name(names[0]))
        seen[names].update(x)

    def change_group(names: InputGroup) -> None:
        here = {names: seen.pop(names)} if names in seen else {}  # no call of this process may have come here
        statistics = together(block, here, moment=True, ranges=ranges)[names]
        change(names, dict.fromkeys(names, statistics))

    block.outputs = synchronized_forwards(block, input_groups, see, change_group)


def _paused_bytes(block: Block, linears: Mapping[str, nn.Linear]) -> int:
    """About how much all calls of a process hold when they pause at the widest layer: its input, and the residual stream three times."""
    call = next(iter(block.calls), Call())
    tensors = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.ndim > 1 and tensor.numel()]
    rows = max((tensor.numel() // tensor.shape[-1] for tensor in tensors), default=0)
    widths = [linear.in_features for linear in linears.values()]
    held = len(block.calls) * rows * (3 * min(widths) + max(widths)) * next(iter(linears.values())).weight.element_size()
    return max(block.processes.gather(held))
