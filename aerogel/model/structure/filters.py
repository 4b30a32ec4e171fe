"""Filters of convolutions that can leave a block: output channels that another convolution reads, through norms of channels between.

Makers are the convolutions whose outputs reach the reader with no other layer between, and linear layers whose outputs are added to these
channels or scale them, such as the projection of a time step. A group norm computes its statistics over the channels of a group, so a unit
is a whole group then: the groups that stay are normalised as before. Of a batch norm the statistics leave with the channel.

What is found is verified on one block with random weights: nothing but the reader sees the channels, and the block without them computes
what the whole block does whose reader has zeros in their columns.

Letters: U units, C channels, I columns of the reader.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.layers.narrowed import Widths
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import temporary_hooks
from aerogel.model.structure.coupled import CoupledChannels, coupled_by_block, differs, makers, narrow, with_vectors
from aerogel.model.structure.edges import parameters_of, random_weights, run_copied
from aerogel.model.structure.examples import Example
from aerogel.model.structure.observer import double_by_default
from aerogel.model.structure.probe import Probe, Refused

_Norm = nn.GroupNorm | nn.BatchNorm2d
_CLOSE = 1e-9
"""Relative difference up to which two float64 forwards are the same."""


def filters_by_block(module: nn.Module, blocks: Sequence[str], examples: Sequence[Example]) -> dict[str, tuple[CoupledChannels, ...]]:
    """Find the filters of all blocks, of one block of each kind that an example reaches; none where a layer was replaced or is shared."""
    having = [name for name in blocks if any(isinstance(part, nn.Conv2d) for part in module.get_submodule(name).modules())]
    return dict.fromkeys(blocks, ()) | (coupled_by_block(module, having, examples, filters_of) if having else {})


def filters_of(block: nn.Module, call: Call, seed: int = 0) -> tuple[CoupledChannels, ...]:
    """Find and verify the filters of a block with inputs like those it gets; random weights stand for its own."""
    with random_weights(block, seed):
        call = call.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        probe = Probe(lambda: run_copied(block, call), parameters_of(block))
        found: dict[str, CoupledChannels] = {}
        for one in _candidates(block, probe):
            if one.reader not in found and (whole := _with_norms(block, probe, one)) is not None and _is_verified(block, call, whole):
                found[one.reader] = whole
    return tuple(found.values())


def widths_after(block: nn.Module, one: CoupledChannels, stays: int) -> Widths:
    """Return the widths of the layers of a block that are narrower when so many units stay, by name in the block."""
    found: dict[str, dict[str, int]] = {one.reader: {"in_channels": _channels(block, one) // one.units * stays}}
    for name, unit_R in one.rows.items():
        home, _, key = name.rpartition(".")
        if key != "weight":
            continue
        layer, width = block.get_submodule(home), len(unit_R) // one.units * stays
        match layer:
            case nn.Conv2d():
                found[home] = {"out_channels": width}
            case nn.Linear():
                found[home] = {"out_features": width}
            case nn.GroupNorm():
                found[home] = {"num_channels": width, "num_groups": layer.num_groups // one.units * stays}
            case nn.BatchNorm2d():
                found[home] = {"num_features": width}
    return found


def _channels(block: nn.Module, one: CoupledChannels) -> int:
    return int(block.get_submodule(one.reader).get_parameter("weight").shape[1])


def _candidates(block: nn.Module, probe: Probe) -> Iterator[CoupledChannels]:
    """Yield guesses: makers with as many outputs as the reader has channels, or linear layers with two outputs a channel."""
    parts = dict(block.named_modules())
    for reader, sources in makers(probe).items():
        layers = [parts.get(source) for source in sources]
        if not _is_convolution(parts.get(reader)) or not any(_is_convolution(layer) for layer in layers):
            continue
        weight = block.get_submodule(reader).get_parameter("weight")
        channels, unit_C = weight.shape[1], torch.arange(weight.shape[1])
        layouts: list[list[Tensor]] = []
        for layer in layers:
            outputs = len(layer.get_parameter("weight")) if _is_convolution(layer) or type(layer) is nn.Linear else 0  # type: ignore[union-attr]
            doubled = [unit_C.repeat(2), unit_C.repeat_interleave(2)] if type(layer) is nn.Linear and outputs == 2 * channels else []
            layouts.append([unit_C] if outputs == channels else doubled)
        columns_I = unit_C.repeat_interleave(weight[0, 0].numel())
        for chosen in product(*layouts):
            rows = with_vectors(block, dict(zip(sources, chosen, strict=True)))
            yield CoupledChannels("filters", reader, channels, columns_I, rows)


def _is_convolution(layer: Any) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == 1


def _with_norms(block: nn.Module, probe: Probe, one: CoupledChannels) -> CoupledChannels | None:
    """Return a guess with the norms that see its channels, in units of whole groups; None where something else sees them."""
    norms = {name: part for name, part in block.named_modules() if isinstance(part, _Norm)}
    before, after = _inputs_of(norms, lambda: probe.run(answer=lambda read: probe.reads[read.key].y.clone())), {}
    try:
        after = _inputs_of(norms, lambda: differs(probe, one, torch.ones(one.units, dtype=torch.bool)))
    except Refused:
        return None
    between = {
        name: part for name, part in norms.items() if name in before and name in after and not torch.equal(before[name], after[name])
    }
    channels = one.units
    units = math.gcd(channels, *(part.num_groups for part in between.values() if isinstance(part, nn.GroupNorm)))
    size = channels // units
    rows = {name: unit_R // size for name, unit_R in one.rows.items()}
    for name, part in between.items():
        held = [*part.named_parameters(name, recurse=False), *part.named_buffers(name, recurse=False)]
        rows |= {full: torch.arange(channels) // size for full, tensor in held if tensor.shape == (channels,)}
    return replace(one, units=units, columns_I=one.columns_I // size, rows=rows) if units > 1 else None


def _inputs_of(norms: dict[str, Any], run: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].detach().clone())

    with temporary_hooks([part.register_forward_pre_hook(hook(name)) for name, part in norms.items()]):
        run()
    return seen


@torch.no_grad()
def _is_verified(block: nn.Module, call: Call, one: CoupledChannels) -> bool:
    """Return True where the block without every other unit computes what it does with zeros in the columns that read them."""
    for first in (0, 1):
        unit_K = torch.arange(one.units)[first::2]
        zeroed, narrowed = copy.deepcopy(block), copy.deepcopy(block)
        weight = zeroed.get_submodule(one.reader).get_parameter("weight")
        weight.flatten(1)[:, ~torch.isin(one.columns_I, unit_K)] = 0
        narrow(narrowed, one, unit_K)
        for name, own in widths_after(block, one, len(unit_K)).items():
            vars(narrowed.get_submodule(name)).update(own)
        try:
            with double_by_default():
                pairs = zip(tensors_in(run_copied(zeroed, call)), tensors_in(run_copied(narrowed, call)), strict=True)
                close = [_is_close(mine, theirs) for theirs, mine in pairs]
        except Exception:  # noqa: BLE001  whatever the code of a block raises for channels that it does not expect
            return False
        if not all(close):
            return False
    return True


def _is_close(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape or not theirs.is_floating_point():
        return torch.equal(mine, theirs)
    return torch.allclose(mine, theirs, rtol=0, atol=_CLOSE * float(theirs.abs().max()))
