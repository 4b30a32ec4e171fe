"""Experts one by one: transformers keeps a block's experts as two 3-D parameters; here they become linear layers and go back.

Legend: E experts, I inner width, H hidden width, T tokens, K experts a token goes to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.experts import Expert, ExpertLayout, ExpertList, all_float, fused_parameters, part_of
from aerogel.layers.slots import slots
from aerogel.model.family import Family


def unfuse(module: nn.Module, family: Family) -> list[str]:
    """Turn every fused experts module below `module` into an ExpertList, in place, and return their names.

    Weights on the meta device stay there. Raises AerogelError when the fused parameters are not laid out as the family says.
    """
    if family.experts is None:
        return []
    end = family.experts.module
    found = {
        name: part
        for name, part in module.named_modules()
        if f".{name}".endswith(f".{end}") and _is_fused(name, part, family.experts.layout)
    }
    for name, fused in found.items():
        module.set_submodule(name, _split(fused, family.experts.layout))
    return list(found)


def fuse(module: nn.Module) -> list[str]:
    """Put the fused modules back, in place, bit for bit, and return their names; experts that were quantized stay apart."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList)}
    whole = {name: experts for name, experts in found.items() if all_float(experts)}
    for name, experts in whole.items():
        module.set_submodule(name, _join(experts))
    return list(whole)


def narrow(router: Any, numbers: Sequence[int]) -> None:
    """Let a router know these experts only, in this order."""
    for slot in slots(router):
        if len(slot.tensor) == router.num_experts:
            slot.put(slot.like(slot.tensor.detach()[list(numbers)]))
    router.num_experts = len(numbers)


@contextmanager
def narrowed(router: Any, numbers: Sequence[int]) -> Iterator[None]:
    """The same for a while."""
    before, count = list(slots(router)), router.num_experts
    narrow(router, numbers)
    try:
        yield
    finally:
        for slot in before:
            slot.put(slot.tensor)
        router.num_experts = count


def _is_fused(name: str, module: nn.Module, names: ExpertLayout) -> bool:
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
    if not any(len(shape) == 3 for shape in shapes.values()):
        return False
    experts, *down = shapes.get("down_proj", (0, 0, 0))
    inner, hidden = down if names.interleaved else down[::-1]
    expected: dict[str, tuple[int, ...]] = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
    if names.interleaved:
        expected = {key: (shape[0], shape[2], shape[1]) for key, shape in expected.items()}
        expected |= {"gate_up_proj_bias": (experts, 2 * inner), "down_proj_bias": (experts, hidden)}
    if shapes != expected:
        layout = (
            "gate_up_proj (E, H, 2I), down_proj (E, I, H) and a bias of each"
            if names.interleaved
            else "gate_up_proj (E, 2I, H) and down_proj (E, H, I) only"
        )
        raise AerogelError(f"{name}: fused experts have {shapes}; expected {layout}")
    return True


def _split(fused: nn.Module, names: ExpertLayout) -> ExpertList:
    parameters = dict(fused.named_parameters(recurse=False))
    experts = []
    for number in range(len(parameters["down_proj"])):
        weights = _weights({key: parameter[number] for key, parameter in parameters.items()}, names)
        gate, up, down = (_linear(*pair, trains=parameters["down_proj"].requires_grad) for pair in weights)
        experts.append(Expert(names, gate, up, down, fused))
    for key, parameter in parameters.items():
        setattr(fused, key, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
    return ExpertList(experts, fused, names).train(fused.training)


def _weights(one: Mapping[str, Tensor], names: ExpertLayout) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight_OI and bias_O of one expert's gate, up and down."""
    for key, of in (("gate_up_proj", 2), ("down_proj", 1)):
        for turn in range(of):
            weight, bias = (one.get(name) for name in (key, f"{key}_bias"))
            assert weight is not None
            yield (
                part_of(weight, turn, of, names.interleaved),
                None if bias is None else part_of(bias, turn, of, names.interleaved),
            )


def _linear(weight_OI: Tensor, bias_O: Tensor | None, trains: bool) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    for key, value in (("weight", weight_OI), ("bias", bias_O)):
        if value is not None:
            # A copy, so that an expert that is quantized or released lets its memory go.
            setattr(linear, key, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=trains))
    return linear


def _join(experts: ExpertList) -> nn.Module:
    (fused,) = experts._fused
    trains = next(experts.parameters()).requires_grad
    for key, value in fused_parameters(experts.state_dict(), experts.names).items():
        setattr(fused, key, nn.Parameter(value, requires_grad=trains))
    return fused
