"""Experts one by one: transformers keeps a block's experts as two 3-D parameters; here they become linears and go back.

Legend: E experts, I inner width, H hidden width, T tokens, K experts a token goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.kernels.experts import loop
from aerogel.model.checkpoint import Piece
from aerogel.model.family import Experts, Family
from aerogel.model.slots import slots

_FUSED = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


class Expert(nn.Module):
    """One gated MLP whose linears are called what they are called on disk."""

    def __init__(self, names: Experts, gate: nn.Linear, up: nn.Linear, down: nn.Linear, fused: nn.Module) -> None:
        super().__init__()
        self._names = (names.gate, names.up, names.down)
        for name, linear in zip(self._names, (gate, up, down), strict=True):
            self.add_module(name, linear)
        if names.interleaved:
            self._fused = (fused,)
        else:
            self.act_fn = fused.get_submodule("act_fn")

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Gate, up and down."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """Activated gate times up, then down: (tokens, H) -> (tokens, H)."""
        gate, up, down = self.linears
        result: Tensor = down(self._gated(gate(x), up(x)))
        return result

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if hasattr(self, "act_fn"):
            return self.act_fn(gate) * up
        return self._fused[0]._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))  # type: ignore[operator]


class ExpertList(nn.ModuleList):
    """A block's experts as modules `0`, `1`, ...; an expert runs on the tokens routed to it and not at all when there are none."""

    def __init__(self, experts: list[Expert], fused: nn.Module, names: Experts) -> None:
        super().__init__(experts)
        self._fused = (fused,)  # in a tuple: it has no weights now, and no module here should list it
        self.names = names

    def keep(self, numbers: Sequence[int]) -> None:
        """Let go of all experts but these, which move up."""
        kept = [self[number] for number in numbers]
        del self[:]
        self.extend(kept)
        self._fused[0].num_experts = len(kept)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: (T, H), (T, K), (T, K) -> (T, H).

        Pairs with the number E are nobody's: expert parallelism marks tokens of other machines so, skipping those it drops.
        """
        return loop(hidden_states, top_k_index, top_k_weights, len(self), lambda number, x_PH: self[number](x_PH))


def unfuse(module: nn.Module, family: Family) -> list[str]:
    """Turn every fused experts module below `module` into an ExpertList, in place, and return their names.

    Weights on the meta device stay there. Raises AerogelError when the fused parameters are not laid out as the family says.
    """
    if family.experts is None:
        return []
    end = family.experts.module
    found = {
        name: part for name, part in module.named_modules() if f".{name}".endswith(f".{end}") and _is_fused(name, part, family.experts)
    }
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


def pieces(family: Family, name: str, shape: Callable[[], tuple[int, ...]]) -> dict[str, Piece]:
    """What a fused parameter of a checkpoint is made of, by the names that these have in memory; nothing for any other tensor."""
    names = family.experts
    home, _, key = name.rpartition(".")
    if names is None or not names.fused or not f".{home}".endswith(f".{names.module}") or key not in _FUSED:
        return {}
    kind = "bias" if key.endswith("_bias") else "weight"
    parts = (names.gate, names.up) if key.startswith("gate_up") else (names.down,)
    found = {}
    for number in range(shape()[0]):
        for turn, part in enumerate(parts):
            found[f"{home}.{number}.{part}.{kind}"] = Piece(number, partial(_part, turn=turn, of=len(parts), interleaved=names.interleaved))
    return found


def _part(fused: Tensor, turn: int, of: int, interleaved: bool) -> Tensor:
    """One of the parts that a single expert's fused parameter holds, outputs first."""
    if not interleaved:
        return fused.chunk(of)[turn]
    return (fused.T if fused.ndim > 1 else fused)[turn::of]


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


def joined(module: nn.Module, family: Family, tensors: Iterable[tuple[str, Tensor]], always: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on by full name; those of experts in float as fused parameters, where checkpoints of the family hold these or `always`.

    The experts of one block are in memory at a time, if they come one block after another. Nothing is passed on from meta.
    """
    whole = {name: part for name, part in module.named_modules() if isinstance(part, ExpertList) and _all_float(part)}
    if family.experts is None or not (family.experts.fused or always):
        whole = {}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in whole}
    for name, tensor in tensors:
        home = next((home for home in whole if name.startswith(f"{home}.")), None)
        if home is None:
            yield name, tensor
            continue
        waiting[home][name.removeprefix(f"{home}.")] = tensor
        if len(waiting[home]) == len(whole[home].state_dict()):
            for key, parameter in _fused_of(waiting.pop(home), whole[home].names).items():
                yield f"{home}.{key}", parameter


def _is_fused(name: str, module: nn.Module, names: Experts) -> bool:
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


def _split(fused: nn.Module, names: Experts) -> ExpertList:
    parameters = dict(fused.named_parameters(recurse=False))
    experts = []
    for number in range(len(parameters["down_proj"])):
        weights = _weights({key: parameter[number] for key, parameter in parameters.items()}, names)
        gate, up, down = (_linear(*pair, trains=parameters["down_proj"].requires_grad) for pair in weights)
        experts.append(Expert(names, gate, up, down, fused))
    for key, parameter in parameters.items():
        setattr(fused, key, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
    return ExpertList(experts, fused, names).train(fused.training)


def _weights(one: Mapping[str, Tensor], names: Experts) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight_OI and bias_O of one expert's gate, up and down."""
    for key, of in (("gate_up_proj", 2), ("down_proj", 1)):
        for turn in range(of):
            weight, bias = (one.get(name) for name in (key, f"{key}_bias"))
            assert weight is not None
            yield (
                _part(weight, turn, of, names.interleaved),
                None if bias is None else _part(bias, turn, of, names.interleaved),
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
    for key, value in _fused_of(experts.state_dict(), experts.names).items():
        setattr(fused, key, nn.Parameter(value, requires_grad=trains))
    return fused


def _fused_of(state: Mapping[str, Tensor], names: Experts) -> dict[str, Tensor]:
    """The fused parameters, out of the tensors of experts one by one."""
    count = 1 + max(int(key.partition(".")[0]) for key in state)

    def stacked(part: str, kind: str) -> Tensor:
        return torch.stack([state[f"{number}.{part}.{kind}"] for number in range(count)])

    gate, up, down = (stacked(part, "weight") for part in (names.gate, names.up, names.down))
    if not names.interleaved:
        return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}
    biases = [stacked(part, "bias") for part in (names.gate, names.up, names.down)]
    return {
        "gate_up_proj": torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2).contiguous(),
        "gate_up_proj_bias": torch.stack(biases[:2], dim=2).flatten(1),
        "down_proj": down.transpose(1, 2).contiguous(),
        "down_proj_bias": biases[2],
    }


def _all_float(experts: ExpertList) -> bool:
    return all(type(linear) is nn.Linear for expert in experts if isinstance(expert, Expert) for linear in expert.linears)
