"""Experts one by one: transformers keeps a block's experts as two 3-D parameters; here they become linear layers and go back.

Legend: E experts, I inner width, H hidden width, T tokens, K experts a token goes to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.layers.experts import DenseExpertList, Expert, ExpertLayout, ExpertList, all_float, fused_parameters, part_of
from aerogel.layers.slots import slots

ExpertNames = Callable[[str], ExpertLayout]
"""Full name of a fused module -> a layout with the names that its experts' projections have on disk."""


def unfuse(module: nn.Module, names: ExpertNames = lambda name: ExpertLayout()) -> list[str]:
    """Turn every fused experts module below `module` into an ExpertList, in place, and return their names.

    Weights on the meta device stay there. Modules whose parameters are laid out in an unknown way stay as they are.
    """
    found = {name: layout for name, part in module.named_modules() if (layout := layout_of(part, names(name))) is not None}
    for name, layout in found.items():
        module.set_submodule(name, _split(module.get_submodule(name), layout))
    return list(found)


def layout_of(module: nn.Module, names: ExpertLayout) -> ExpertLayout | None:
    """Return how a module holds fused experts; None where it holds none, in an unknown way, or beside weights of another kind.

    The flags are those of transformers' `use_experts_implementation`; a module without them is known by the convention's `_apply_gate`, or
    by its shapes where it gives every expert all tokens, as in Llama 4.
    """
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
    if not any(len(shape) == 3 for shape in shapes.values()) or "down_proj" not in shapes:
        return None
    if len(module.state_dict()) > len(shapes):  # a norm behind each expert, say, which single experts would not run
        return None
    if hasattr(module, "is_transposed"):
        layout = replace(
            names,
            gate=names.gate if module.has_gate else "",
            interleaved=not module.is_concatenated,
            transposed=bool(module.is_transposed),
            biased=bool(module.has_bias),
        )
    elif hasattr(module, "_apply_gate"):  # by the same convention, without its flags
        layout = names
    else:
        layout = replace(names, transposed=True, dense=True)
        if not hasattr(module, "act_fn") or len(inspect.signature(module.forward).parameters) != 1:
            return None
    experts, *down = shapes["down_proj"]
    inner, hidden = down if layout.transposed else down[::-1]
    return layout if shapes == layout.shapes(experts, inner, hidden) else None


def fuse(module: nn.Module, keep: Sequence[nn.Module] = ()) -> list[str]:
    """Put the fused modules back, in place, bit for bit, and return their names; those in `keep` and quantized experts stay apart."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList)}
    whole = {name: experts for name, experts in found.items() if experts not in keep and all_float(experts)}
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


def _split(fused: nn.Module, names: ExpertLayout) -> ExpertList:
    parameters = dict(fused.named_parameters(recurse=False))
    trains = parameters["down_proj"].requires_grad
    experts = []
    for number in range(len(parameters["down_proj"])):
        one = {key: parameter[number] for key, parameter in parameters.items()}
        experts.append(Expert(names, [_linear(*pair, trains=trains) for pair in _weights(one, names)], fused))
    for key, parameter in parameters.items():
        setattr(fused, key, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
    kind = DenseExpertList if names.dense else ExpertList
    return kind(experts, fused, names).train(fused.training)


def _weights(one: Mapping[str, Tensor], names: ExpertLayout) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight_OI and bias_O of one expert's projections."""
    for key in (names.first, "down_proj"):
        of, bias = len(names.parts(key)), one.get(f"{key}_bias")
        for turn in range(of):
            yield part_of(one[key], turn, of, names), None if bias is None else part_of(bias, turn, of, names)


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
