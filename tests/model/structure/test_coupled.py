"""Coupled channels are found where rows meet columns one by one, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.structure.coupled import coupled_of
from tests.tiny import opened


class Mlp(nn.Module):
    """An FFN whose hidden channels pass a function on their way."""

    def __init__(self, gated: bool = False, between: nn.Module | None = None, second_reader: bool = False) -> None:
        super().__init__()
        self.gated, self.between = gated, between or nn.GELU()
        self.up, self.down = nn.Linear(8, 24 if gated else 12), nn.Linear(12, 8)
        self.other = nn.Linear(12, 8) if second_reader else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.gated:
            gate, y = y[..., ::2], y[..., 1::2]
            y = y * gate.sigmoid()
        y = self.between(y)
        return x + self.down(y) + (self.other(y) if self.other is not None else 0)


def channels(block: nn.Module) -> dict[str, int]:
    call = Call((torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)),))
    return {one.reader: one.units for one in coupled_of(block, call)}


@pytest.mark.parametrize("between", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Identity()])
@pytest.mark.parametrize("gated", [False, True])
def test_channels_that_pass_one_by_one(between: nn.Module, gated: bool) -> None:
    block = Mlp(gated, between)
    assert channels(block) == {"down": 12}
    (one,) = coupled_of(block, Call((torch.randn(2, 6, 8),)))
    assert {name: unit_R.tolist() for name, unit_R in one.rows.items()} == dict.fromkeys(
        ("up.weight", "up.bias"), [row // 2 for row in range(24)] if gated else list(range(12))
    )


class Flip(nn.Module):
    """Channels in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


@pytest.mark.parametrize(
    "block", [Mlp(between=nn.LayerNorm(12)), Mlp(between=nn.Softmax(-1)), Mlp(between=Flip()), Mlp(second_reader=True)]
)
def test_channels_that_meet_are_not_coupled(block: nn.Module) -> None:
    assert channels(block) == {}


class TwoOutputs(Mlp):
    """An FFN whose hidden channels leave the block too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.up(x))
        return torch.cat([self.down(y), y], -1)


def test_channels_that_leave_the_block_stay() -> None:
    assert channels(TwoOutputs()) == {}


def test_weights_are_not_read_and_are_what_they_were() -> None:
    network = opened("llama")
    before = {name: (parameter, parameter.clone()) for name, parameter in network.module.named_parameters()}
    found = network.coupled
    assert {one.kind for one in found["model.layers.0"]} == {"heads", "feed_forwards"}
    for name, parameter in network.module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("llama", {"self_attn.q_proj.weight": 64, "self_attn.k_proj.weight": 32, "self_attn.v_proj.weight": 32}),
        ("phi3", {"self_attn.qkv_proj.weight": 128}),
        ("gpt_oss", {"self_attn.sinks": 4}),
        ("deepseek_v3", {"self_attn.q_b_proj.weight": 96, "self_attn.kv_b_proj.weight": 128}),
    ],
)
def test_heads_of_fused_and_of_latent_layers(name: str, rows: dict[str, int]) -> None:
    (heads,) = [one for one in opened(name).coupled["model.layers.0"] if one.kind == "heads"]
    assert rows.items() <= {parameter: len(unit_R) for parameter, unit_R in heads.rows.items()}.items()
    for unit_R in heads.rows.values():
        assert unit_R.bincount().unique().numel() == 1  # each unit has as many
