"""The experts of an MoE layer as modules of their own, and the layout of the fused parameters that they came from.

Legend: E experts, I inner width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from aerogel.kernels.experts import loop


@dataclass(frozen=True)
class ExpertLayout:
    """Names of an expert's projections, and how fused parameters hold them: (E, outputs, inputs), gate's outputs before those of up."""

    gate: str = "gate_proj"
    """Empty where experts have no gate."""
    up: str = "up_proj"
    down: str = "down_proj"
    interleaved: bool = False
    """True where gate and up alternate among the outputs."""
    transposed: bool = False
    """True where fused parameters are (E, inputs, outputs)."""
    biased: bool = False
    """True where there are biases, (E, outputs)."""
    dense: bool = False
    """True where every expert gets all tokens, (E x T, H) in, weighted before it."""
    fused_on_disk: bool = False
    """True where checkpoints hold the fused parameters themselves."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections: gate if there is one, up, down."""
        return (self.gate, self.up, self.down) if self.gate else (self.up, self.down)

    @property
    def first(self) -> str:
        """Name of the fused parameter of gate and up."""
        return "gate_up_proj" if self.gate else "up_proj"

    def parts(self, key: str) -> tuple[str, ...]:
        """Names of the projections that a fused parameter holds, in its order."""
        return self.projections[-1:] if key.startswith("down_proj") else self.projections[:-1]

    def shapes(self, experts: int, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the fused parameters of E experts, I and H wide."""
        outputs = len(self.parts(self.first)) * inner
        found: dict[str, tuple[int, ...]] = {self.first: (experts, outputs, hidden), "down_proj": (experts, hidden, inner)}
        if self.transposed:
            found = {key: (shape[0], shape[2], shape[1]) for key, shape in found.items()}
        return found | ({f"{self.first}_bias": (experts, outputs), "down_proj_bias": (experts, hidden)} if self.biased else {})


class Expert(nn.Module):
    """One MLP, gated or not, whose projections have the names they have in checkpoints."""

    def __init__(self, names: ExpertLayout, linears: Sequence[nn.Linear], fused: nn.Module) -> None:
        super().__init__()
        self._names = names.projections
        self.act_fn: Callable[[Tensor], Tensor]
        for name, linear in zip(self._names, linears, strict=True):
            self.add_module(name, linear)
        self._interleaved = names.interleaved
        if names.gate and own_gate(fused):
            self._fused = (fused,)
        else:
            self.act_fn = cast(Callable[[Tensor], Tensor], fused.act_fn)  # a module or a function

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """Gate if there is one, up and down."""
        return tuple(self.get_submodule(name) for name in self._names)

    def forward(self, x: Tensor) -> Tensor:
        """Activated gate times up, or activated up, then down: (tokens, H) -> (tokens, H)."""
        *first, down = self.linears
        result: Tensor = down(self._gated(first[0](x), first[1](x)) if len(first) > 1 else self.act_fn(first[0](x)))
        return result

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if hasattr(self, "act_fn"):
            return self.act_fn(gate) * up
        together = torch.stack([gate, up], dim=-1).flatten(-2) if self._interleaved else torch.cat([gate, up], dim=-1)
        return self._fused[0]._apply_gate(together)  # type: ignore[operator]


def own_gate(fused: nn.Module) -> bool:
    """Return True where a fused module multiplies gate and up in a way of its own, with a clamp for example."""
    return hasattr(fused, "_apply_gate") and type(fused)._apply_gate.__module__ == type(fused).__module__  # type: ignore[attr-defined]


class ExpertList(nn.ModuleList):
    """A block's experts as modules `0`, `1`, ...; an expert runs on the tokens routed to it and not at all when there are none."""

    def __init__(self, experts: list[Expert], fused: nn.Module, names: ExpertLayout) -> None:
        super().__init__(experts)
        self._fused = (fused,)  # in a tuple: it has no weights now, and no module here should list it
        self.names = names

    def keep(self, numbers: Sequence[int]) -> None:
        """Remove all experts but these, which are renumbered in this order."""
        kept = [self[number] for number in numbers]
        del self[:]
        self.extend(kept)
        self._fused[0].num_experts = len(kept)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: (T, H), (T, K), (T, K) -> (T, H).

        An assignment to expert number E is to none: expert parallelism marks tokens of other ranks so, expert skipping what it drops.
        """
        return loop(hidden_states, top_k_index, top_k_weights, len(self), lambda number, x_PH: self[number](x_PH))


class DenseExpertList(ExpertList):
    """The same where every expert gets all tokens, weighted by the router before."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Each expert's part, one after another: (E x T, H) -> (E x T, H)."""
        return torch.cat([expert(x_TH) for expert, x_TH in zip(self, hidden_states.chunk(len(self)), strict=True)])


def part_of(fused: Tensor, turn: int, of: int, names: ExpertLayout) -> Tensor:
    """Return part `turn` of the `of` parts that one expert's fused parameter holds, outputs first."""
    outputs_first = fused.T if names.transposed and fused.ndim > 1 else fused
    return outputs_first[turn::of] if names.interleaved else outputs_first.chunk(of)[turn]


def fused_parameters(state: Mapping[str, Tensor], names: ExpertLayout) -> dict[str, Tensor]:
    """Build the fused parameters from the tensors of single experts."""
    count = 1 + max(int(key.partition(".")[0]) for key in state)
    found = {}
    for kind in ("weight", "bias") if names.biased else ("weight",):
        for key in (names.first, "down_proj"):
            parts = [torch.stack([state[f"{number}.{part}.{kind}"] for number in range(count)]) for part in names.parts(key)]
            whole = torch.stack(parts, dim=2).flatten(1, 2) if names.interleaved else torch.cat(parts, dim=1)
            if kind == "bias":
                found[f"{key}_bias"] = whole
            else:
                found[key] = whole.transpose(1, 2).contiguous() if names.transposed else whole
    return found


def all_float(experts: ExpertList) -> bool:
    """Return True while no expert's projection was replaced, by a quantized one for example."""
    return all(type(linear) is nn.Linear for expert in experts if isinstance(expert, Expert) for linear in expert.linears)
