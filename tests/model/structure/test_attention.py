"""Attentions are found with the layers around them and the layout of their heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.calls import Call
from aerogel.model.structure.attention import Attention
from aerogel.model.structure.edges import edges_of
from tests.tiny import FAMILIES, opened

HEADS, KEY_HEADS, WIDTH = 4, 2, 3


def attentions(name: str) -> list[Attention]:
    return [attention for edges in {id(found): found for found in opened(name).edges.values()}.values() for attention in edges.attentions]


@pytest.mark.parametrize("name", sorted(name for name, tiny in FAMILIES.items() if hasattr(tiny.build().config, "get_text_config")))
def test_heads_are_those_of_the_configuration(name: str) -> None:
    network = opened(name)
    config: Any = network.config.get_text_config()
    blocks = [found for block, found in network.edges.items() if "vi" not in block.split("layers")[0]]
    assert blocks
    for found in blocks:
        (attention,) = found.attentions
        assert attention.heads == config.num_attention_heads
        assert attention.key_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@pytest.mark.parametrize(
    ("name", "queries", "keys", "values", "outputs"),
    [
        ("phi3", "qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
        ("deepseek_v3", "q_b_proj", "kv_a_proj_with_mqa kv_b_proj", "kv_b_proj", "o_proj"),
        ("sd3", "to_q add_q_proj", "to_k add_k_proj", "to_v add_v_proj", "to_add_out to_out.0"),
        ("wan", "to_q", "to_k", "to_v", "to_out.0"),
    ],
)
def test_layers_are_told_by_what_they_feed(name: str, queries: str, keys: str, values: str, outputs: str) -> None:
    first = attentions(name)[0]
    found = [
        [layer.removeprefix(f"{first.module}.") for layer in layers] for layers in (first.queries, first.keys, first.values, first.outputs)
    ]
    assert found == [names.split() for names in (queries, keys, values, outputs)]


def test_self_attention_and_cross_attention_are_two() -> None:
    assert [attention.module for attention in attentions("wan")] == ["attn1", "attn2"]


class Written(nn.Module):
    """Grouped attention by a function of torch, or written out."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.q, self.out = nn.Linear(8, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 8)
        self.kv, self.gate = nn.Linear(8, 2 * KEY_HEADS * WIDTH), nn.Linear(8, HEADS * WIDTH)

    def forward(self, x_NTI: Tensor) -> Tensor:
        query, kv = (layer(x_NTI).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.kv))
        key, value = (half.repeat_interleave(HEADS // KEY_HEADS, 1) for half in kv.chunk(2, dim=1))
        if self.by == "sdpa":
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.transpose(-1, -2) if self.by == "@" else torch.matmul(query, key.transpose(2, 3)) * WIDTH**-0.5
            attended = torch.matmul(torch.softmax(scores, dim=-1), value)
        return x_NTI + self.out(attended.transpose(1, 2).flatten(2) * self.gate(x_NTI).sigmoid())


@pytest.mark.parametrize("by", ["sdpa", "@", "matmul"])
def test_attention_may_be_written_out(by: str) -> None:
    block = nn.ModuleDict({"inner": Written(by)})
    block.forward = lambda x: block["inner"](x)  # type: ignore[method-assign]
    found = edges_of(block, Call((torch.randn(2, 5, 8),)))
    assert found.attentions == (Attention("inner", ("inner.q",), ("inner.kv",), ("inner.kv",), ("inner.out",), HEADS, KEY_HEADS, WIDTH),)


def test_blocks_without_attention_have_none() -> None:
    assert not edges_of(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), Call((torch.randn(2, 5, 4),))).attentions


def test_attention_without_gradients_costs_no_edges() -> None:
    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            made = self.up(x)
            if made.requires_grad:
                raise NotImplementedError("no backward")
            down: Tensor = self.down(made)
            return down

    found = edges_of(Forward().requires_grad_(False), Call((torch.randn(2, 5, 4),)))
    assert [(edge.sources, edge.sinks) for edge in found.edges] == [(("up",), ("down",))]
    assert not found.attentions
