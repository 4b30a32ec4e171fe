"""Experts one by one: transformers keeps a block's experts as two 3-D parameters; here they become linears and go back.

Legend: E experts, I inner width, H hidden width, T tokens, K experts a token goes to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.family import Experts, Family


class Expert(nn.Module):
    """One gated MLP whose linears are called what they are called on disk."""

    def __init__(self, names: Experts, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self._names = (names.gate, names.up, names.down)
        for name, linear in zip(self._names, (gate, up, down), strict=True):
            self.add_module(name, linear)
        self.act_fn = activation

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Gate, up and down."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """Activated gate times up, then down: (tokens, H) -> (tokens, H)."""
        gate, up, down = self.linears
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class ExpertList(nn.ModuleList):
    """A block's experts as modules `0`, `1`, ...; an expert runs on the tokens routed to it and not at all when there are none."""

    def __init__(self, experts: list[Expert], fused: nn.Module) -> None:
        super().__init__(experts)
        self._fused = (fused,)  # in a tuple: it has no weights now, and no module here should list it

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: (T, H), (T, K), (T, K) -> (T, H).

        Expert parallelism marks tokens of other machines' experts with the number E; they add nothing.
        """
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self)).tolist()
        each = hidden_states.new_zeros(len(chosen), hidden_states.shape[-1])
        for number, places in enumerate(order.split(counts)[: len(self)]):
            if len(places):
                each[places] = self[number](hidden_states[places // top_k_index.shape[-1]])
        weighted = each * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def unfuse(module: nn.Module, family: Family) -> list[str]:
    """Turn every fused experts module below `module` into an ExpertList, in place, and return their names.

    Weights on the meta device stay there. Raises AerogelError when the fused parameters are not those of gated MLPs without bias.
    """
    if family.experts is None:
        return []
    end = family.experts.module
    found = {name: part for name, part in module.named_modules() if f".{name}".endswith(f".{end}") and _is_fused(name, part)}
    for name, fused in found.items():
        module.set_submodule(name, _split(fused, family.experts))
    return list(found)


def fuse(module: nn.Module) -> list[str]:
    """Put the fused modules back, in place, bit for bit, and return their names; experts that were quantized stay apart."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList)}
    whole = {name: experts for name, experts in found.items() if _all_float(experts)}
    for name, experts in whole.items():
        module.set_submodule(name, _join(experts))
    return list(whole)


def _is_fused(name: str, module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    if not any(parameter.ndim == 3 for parameter in parameters.values()):
        return False
    gate_up, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    if len(parameters) != 2 or gate_up is None or down is None or gate_up.shape[1:] != (2 * down.shape[2], down.shape[1]):
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        raise AerogelError(f"{name}: fused experts have {shapes}; expected gate_up_proj (E, 2I, H) and down_proj (E, H, I) only")
    return True


def _split(fused: nn.Module, names: Experts) -> ExpertList:
    gate_up_E, down_E = fused.gate_up_proj, fused.down_proj
    assert isinstance(gate_up_E, nn.Parameter)
    assert isinstance(down_E, nn.Parameter)
    inner, activation = down_E.shape[2], fused.get_submodule("act_fn")
    experts = []
    for gate_up, down in zip(gate_up_E, down_E, strict=True):
        gate, up, last = (_linear(weight, gate_up_E.requires_grad) for weight in (gate_up[:inner], gate_up[inner:], down))
        experts.append(Expert(names, gate, up, last, activation))
    for key, parameter in (("gate_up_proj", gate_up_E), ("down_proj", down_E)):
        setattr(fused, key, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
    return ExpertList(experts, fused).train(fused.training)


def _linear(weight_OI: Tensor, trains: bool) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    # A copy, so that an expert that is quantized or released lets its memory go.
    linear.weight = nn.Parameter(weight_OI.detach().clone(memory_format=torch.contiguous_format), requires_grad=trains)
    return linear


def _join(experts: ExpertList) -> nn.Module:
    (fused,) = experts._fused
    weights = [[_weight(linear) for linear in expert.linears] for expert in experts if isinstance(expert, Expert)]
    trains = weights[0][0].requires_grad
    gate_up_E = torch.stack([torch.cat([gate, up]) for gate, up, _ in weights]).detach()
    down_E = torch.stack([down for _, _, down in weights]).detach()
    fused.gate_up_proj = nn.Parameter(gate_up_E, requires_grad=trains)
    fused.down_proj = nn.Parameter(down_E, requires_grad=trains)
    return fused


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight


def _all_float(experts: ExpertList) -> bool:
    return all(type(linear) is nn.Linear for expert in experts if isinstance(expert, Expert) for linear in expert.linears)
