"""Layers that engines load as one tensor, in models whose own code shows them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.structure.examples import Example
from aerogel.model.structure.fused_sets import fused_sets_of
from tests.tiny import opened

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
TEXT = [ATTENTION, MLP]
DENOISER = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
JOINT = [("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")]

KNOWN: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("llama", "model.layers.0"): TEXT,
    ("gemma3", "model.layers.1"): TEXT,
    ("opt", "model.decoder.layers.0"): [ATTENTION],
    ("phi3", "model.layers.0"): [],  # its own code has them as one layer
    ("mixtral", "model.layers.1"): [ATTENTION, *((f"mlp.experts.{one}.w1", f"mlp.experts.{one}.w3") for one in range(4))],
    ("deepseek_v3", "model.layers.0"): [("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), MLP],
    ("qwen2_5_vl", "model.language_model.layers.0"): TEXT,
    ("dit", "transformer_blocks.0"): [DENOISER],
    ("wan", "blocks.1"): [DENOISER, ("attn2.to_k", "attn2.to_v")],
    ("flux", "transformer_blocks.0"): JOINT,
}


@pytest.mark.parametrize(("family", "block"), KNOWN)
def test_they_are_what_the_code_shows(family: str, block: str) -> None:
    assert list(opened(family).fused_sets[block]) == KNOWN[family, block]


def test_shared_experts_are_a_feed_forward_of_their_own() -> None:
    found = opened("deepseek_v3").fused_sets["model.layers.1"]
    assert ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj") in found
    assert ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj") in found
    assert not [names for names in found if "mlp.gate" in names], "a router reads the same and is in another module, or alone"


class Branches(nn.Module):
    """Layers that read one input, a copy of it, and what is like it in shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.copied, self.other, self.behind = (nn.Linear(8, 8) for _ in range(5))
        self.inner = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.same(x) + self.copied(x.clone()) + self.other(x + 1) + self.inner(x)
        return self.behind(y)


def test_copies_count_and_other_modules_do_not() -> None:
    network = nn.ModuleDict({"block": Branches()})
    found = fused_sets_of(network, ("block",), [Example("block", Call((torch.randn(2, 8),)))])
    assert found == {"block": (("first", "same", "copied"),)}


def test_a_block_that_does_not_run_is_left_out() -> None:
    network = nn.ModuleDict({"block": Branches(), "idle": Branches()})
    assert fused_sets_of(network, ("block", "idle"), [Example("block", Call((torch.randn(2, 8),)))]).keys() == {"block"}
    assert not fused_sets_of(network, ("block",), [])
