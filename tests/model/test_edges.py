"""Scales move along an edge as written out by hand, whatever rows a source gives and however often columns read them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.edges import Edge, fold, gather, spread
from tests.saved import round_to_nearest


def block_of(**sizes: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {name: nn.Linear(inputs, outputs) for name, (inputs, outputs) in sizes.items()}
    return nn.ModuleDict(parts | {"norm": nn.LayerNorm(4)})


# Two value heads of three channels, each read by two query heads.
HEADS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])


def test_value_heads_are_read_by_several_query_heads() -> None:
    edge = Edge(("value",), ("out",), HEADS)
    assert edge.rows_C.tolist() == list(range(6))
    assert spread(edge, torch.arange(6.0)).tolist() == HEADS.tolist()
    assert gather(edge, torch.tensor([1.0, 9, 1, 2, 2, 2, 5, 6, 7, 7, 6, 5])).tolist() == [2, 9, 2, 7, 6, 7]


def test_rows_of_a_fused_layer_and_columns_that_something_else_feeds() -> None:
    edge = Edge(("fused",), ("out",), torch.tensor([-1, 5, 3, -1]))
    assert edge.rows_C.tolist() == [3, 5]
    assert edge.channels_I.tolist() == [-1, 1, 0, -1]
    assert spread(edge, torch.tensor([2.0, 4.0])).tolist() == [1, 4, 2, 1]
    assert gather(edge, torch.tensor([9.0, 7, 8, 9])).tolist() == [8, 7]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fold_scales_gain_bias_and_columns(offset: float) -> None:
    block = block_of(query=(4, 2), key=(4, 3))
    norm, query, key = (block.get_submodule(name) for name in ("norm", "query", "key"))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gain, bias, columns, biases = norm.weight + offset, norm.bias.clone(), (query.weight.clone(), key.weight.clone()), query.bias.clone()
    scale = torch.tensor([0.5, 2.0, 4.0, 1.0])
    fold(block, Edge(("norm",), ("query", "key"), torch.arange(4), offset), scale)
    torch.testing.assert_close(norm.weight + offset, gain / scale)
    assert torch.equal(norm.bias, bias / scale)
    assert torch.equal(query.weight, columns[0] * scale)
    assert torch.equal(key.weight, columns[1] * scale)
    assert torch.equal(query.bias, biases)


def test_fold_leaves_the_other_rows_of_a_fused_layer() -> None:
    block = block_of(gate_up=(4, 10), down=(5, 4))
    gate_up, down = block.get_submodule("gate_up"), block.get_submodule("down")
    weight, bias, columns = gate_up.weight.clone(), gate_up.bias.clone(), down.weight.clone()
    fold(block, Edge(("gate_up",), ("down",), torch.arange(5, 10)), torch.full((5,), 2.0))
    assert torch.equal(gate_up.weight, torch.cat([weight[:5], weight[5:] / 2]))
    assert torch.equal(gate_up.bias, torch.cat([bias[:5], bias[5:] / 2]))
    assert torch.equal(down.weight, columns * 2)


def test_a_square_between_source_and_sink_takes_the_root() -> None:
    block = block_of(up=(4, 5), down=(5, 4))
    x, up, down = torch.randn(3, 4), block.get_submodule("up"), block.get_submodule("down")
    expected = down(up(x).relu().square())
    before = up.weight.clone()
    fold(block, Edge(("up",), ("down",), torch.arange(5), power=2), torch.tensor([4.0, 1, 9, 16, 0.25]))
    torch.testing.assert_close(up.weight, before / torch.tensor([2.0, 1, 3, 4, 0.5])[:, None])
    torch.testing.assert_close(down(up(x).relu().square()), expected)


def test_quantized_weights_are_not_folded() -> None:
    block = block_of(up=(4, 32), down=(32, 4))
    round_to_nearest(block, "W4A16_CHANNEL")
    with pytest.raises(AerogelError, match="up is quantized already"):
        fold(block, Edge(("up",), ("down",), torch.arange(32)), torch.ones(32))
