"""The experts of an MoE layer as modules of their own, and the layout of the fused parameters that they came from.

Legend: E experts, I inner width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerogel.kernels.experts import loop


@dataclass(frozen=True)
class ExpertLayout:
    """Names of an expert's projections, and how fused parameters hold them."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    interleaved: bool = False
    """True where fused parameters are (E, inputs, outputs) with biases, and gate and up alternate among the outputs."""


class Expert(nn.Module):
    """One gated MLP whose projections have the names they have in checkpoints."""

    def __init__(self, names: ExpertLayout, gate: nn.Linear, up: nn.Linear, down: nn.Linear, fused: nn.Module) -> None:
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


def part_of(fused: Tensor, turn: int, of: int, interleaved: bool) -> Tensor:
    """Return part `turn` of the `of` parts that one expert's fused parameter holds, outputs first."""
    if not interleaved:
        return fused.chunk(of)[turn]
    return (fused.T if fused.ndim > 1 else fused)[turn::of]


def fused_parameters(state: Mapping[str, Tensor], names: ExpertLayout) -> dict[str, Tensor]:
    """Build the fused parameters from the tensors of single experts."""
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


def all_float(experts: ExpertList) -> bool:
    """Return True while no expert's projection was replaced, by a quantized one for example."""
    return all(type(linear) is nn.Linear for expert in experts if isinstance(expert, Expert) for linear in expert.linears)
