"""Channels of an edge are found and spread over heads as written out by hand; edges that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.block import Block, BoundEdge
from aerogel.model.edges import channels, fold
from aerogel.model.family import Family
from aerogel.model.network import Network


class Attention(nn.Module):
    """Two value heads of three channels; four query heads."""

    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        self.head_dim = 3
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs))


def block_of(norm_offset: float = 0.0, **sizes: tuple[int, int]) -> Block:
    torch.manual_seed(0)
    module = nn.ModuleDict({"attention": Attention(**sizes), "norm": nn.LayerNorm(4)})
    family = Family("toy", ("toy",), norm_offset=norm_offset)
    network = Network(nn.ModuleDict({"blocks": nn.ModuleList([module])}), family)
    return Block("blocks.0", module, 0, 1, (), network)


VALUE = BoundEdge("attention.value", ("attention.out",), heads=True)


def test_value_heads_are_read_by_several_query_heads() -> None:
    found = channels(block_of(value=(4, 6), out=(12, 4)), VALUE)
    assert tuple(found) == (0, 6, 2, 3)
    assert found.spread(torch.arange(6)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert found.gather(torch.tensor([1, 9, 1, 2, 2, 2, 5, 6, 7, 7, 6, 5])).tolist() == [2, 9, 2, 7, 6, 7]


def test_values_are_the_tail_of_fused_queries_keys_and_values() -> None:
    found = channels(block_of(qkv=(4, 24), out=(12, 4)), BoundEdge("attention.qkv", ("attention.out",), heads=True, tail=True))
    assert tuple(found) == (18, 6, 2, 3)


def test_ups_are_the_tail_of_fused_gates_and_ups() -> None:
    found = channels(block_of(gate_up=(4, 10), down=(5, 4)), BoundEdge("attention.gate_up", ("attention.down",), tail=True))
    assert tuple(found) == (5, 5, 1, 5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fold_scales_gain_bias_and_columns(offset: float) -> None:
    block = block_of(offset, query=(4, 2), key=(4, 3))
    norm, query, key = (block.module.get_submodule(name) for name in ("norm", "attention.query", "attention.key"))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gain, bias, columns, biases = norm.weight + offset, norm.bias.clone(), (query.weight.clone(), key.weight.clone()), query.bias.clone()
    scale = torch.tensor([0.5, 2.0, 4.0, 1.0])
    fold(block, BoundEdge("norm", ("attention.query", "attention.key")), scale)
    torch.testing.assert_close(norm.weight + offset, gain / scale)
    assert torch.equal(norm.bias, bias / scale)
    assert torch.equal(query.weight, columns[0] * scale)
    assert torch.equal(key.weight, columns[1] * scale)
    assert torch.equal(query.bias, biases)


def test_fold_leaves_what_comes_before_the_tail() -> None:
    block = block_of(gate_up=(4, 10), down=(5, 4))
    gate_up = block.module.get_submodule("attention.gate_up")
    weight, bias = gate_up.weight.clone(), gate_up.bias.clone()
    fold(block, BoundEdge("attention.gate_up", ("attention.down",), tail=True), torch.full((5,), 2.0))
    assert torch.equal(gate_up.weight, torch.cat([weight[:5], weight[5:] / 2]))
    assert torch.equal(gate_up.bias, torch.cat([bias[:5], bias[5:] / 2]))


@pytest.mark.parametrize(
    ("edge", "sizes", "reason"),
    [
        (BoundEdge("attention.up", ("attention.down",)), {"up": (4, 5), "down": (6, 4)}, "5 channels.*read 6"),
        (BoundEdge("attention.up", ("attention.down",)), {"up": (4, 3), "down": (6, 4)}, "3 channels.*read 6"),
        (VALUE, {"value": (4, 5), "out": (12, 4)}, "5 channels.*read 12"),
        (BoundEdge("norm", ("attention.a", "attention.b")), {"a": (4, 2), "b": (5, 2)}, r"\[4, 5\] columns, one width"),
    ],
)
def test_shapes_that_are_no_edge_are_refused(edge: BoundEdge, sizes: dict[str, tuple[int, int]], reason: str) -> None:
    with pytest.raises(AerogelError, match=reason):
        channels(block_of(**sizes), edge)


def test_shared_heads_need_their_width() -> None:
    block = block_of(value=(4, 6), out=(12, 4))
    del block.module.get_submodule("attention").head_dim
    with pytest.raises(AerogelError, match="Attention shares value heads but has no head_dim"):
        channels(block, VALUE)


def test_quantized_weights_are_not_folded() -> None:
    block = block_of(up=(4, 6), down=(6, 4))
    block.module.get_submodule("attention").down = nn.Identity()
    with pytest.raises(AerogelError, match=r"attention\.down is quantized already"):
        fold(block, BoundEdge("attention.up", ("attention.down",)), torch.ones(6))
