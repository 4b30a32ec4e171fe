"""Gains: vectors that multiply what a module gives channel by channel, such as the weight of a norm, with the offset it is used with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerogel.model.calls import Call, tensors_in
from aerogel.model.structure.observer import Observer, double_by_default
from aerogel.model.structure.probe import holding


@dataclass(frozen=True)
class Gain:
    """A vector that multiplies the output of its module."""

    module: str
    """Name of the module in the block."""
    parameter: nn.Parameter
    offset: float
    """Number added to the vector before it multiplies: 1 in Gemma."""
    bias: nn.Parameter | None

    def scaled(self, s_R: Tensor) -> dict[nn.Parameter, Tensor]:
        """The data of gain and bias with which the module gives its output times s_R."""
        values = {self.parameter: (self.parameter.data + self.offset) * s_R - self.offset}
        return values if self.bias is None else values | {self.bias: self.bias.data * s_R}


def gains_in(block: nn.Module, inputs: Mapping[str, Call]) -> Iterator[Gain]:
    """Find the gains of the modules that ran, with the inputs that they got."""
    for name, module in block.named_modules():
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        if name not in inputs or not own or any(parameter.ndim != 1 for parameter in own.values()):
            continue
        for key, parameter in own.items():
            others = [other for other in own if other != key]
            if key == "bias" or len(others) > 1 or parameter.numel() < 2:
                continue
            bias = own[others[0]] if others else None
            offset = _offset(module, inputs[name], parameter, bias)
            if offset is not None:
                yield Gain(name, parameter, offset, bias)


@torch.no_grad()
def _offset(module: nn.Module, call: Call, gain: nn.Parameter, bias: nn.Parameter | None) -> float | None:
    """The offset of a gain: out(gain + 1) - out(gain) is what it multiplies. None for a vector that does something else."""

    def output(added: float) -> Tensor | None:
        values = {gain: gain.data + added} | ({} if bias is None else {bias: torch.zeros_like(bias)})
        with double_by_default(), Observer({}), holding(values):
            return next(iter(tensors_in(module(*call.args, **call.kwargs))), None)

    zero, one, two = output(0), output(1), output(2)
    if zero is None or one is None or two is None or not zero.is_floating_point() or not zero.numel():
        return None
    unit = one - zero
    largest = unit.abs().max()
    if largest == 0 or (two - one - unit).abs().max() > 1e-9 * largest:
        return None
    for dim in reversed([dim for dim in range(zero.ndim) if zero.shape[dim] == gain.numel()]):
        shape = [1] * zero.ndim
        shape[dim] = -1
        large = unit.abs() > 0.05 * largest
        offsets = (zero / torch.where(large, unit, 1.0) - gain.data.view(shape))[large]
        offset = round(float(offsets.median()))
        if bool((offsets - offset).abs().max() < 1e-6):
            return float(offset)
    return None
