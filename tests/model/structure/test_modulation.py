"""Modulation of adaLN is a source of edges: its multiplying rows and its added rows take a scale together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aerogel.methods.quantization.smoothquant import Smoothquant
from aerogel.model.calls import Call
from aerogel.model.edges import fold
from aerogel.model.structure.edges import BlockEdges, edges_of
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened, output

WIDTH = 12


class Modulated(nn.Module):
    """A block of adaLN: a norm without a gain, multiplied and shifted by what a vector of conditions says, then a layer and its gate."""

    def __init__(self, order: str, offset: float = 1.0, bias: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.order, self.offset, self.shared = order, offset, shared
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(5, len(order) * WIDTH, bias=bias)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x_NTD: Tensor, conditions_NK: Tensor) -> Tensor:
        parts = dict(zip(self.order, self.modulation(conditions_NK)[:, None].chunk(len(self.order), dim=-1), strict=True))
        modulated = self.norm(x_NTD) * (self.offset + parts["a"]) + parts["b"]
        made = self.down(torch.nn.functional.gelu(self.up(modulated))) * parts.get("g", 1)
        return x_NTD + made + (modulated if self.shared else 0)


def call() -> Call:
    generator = torch.Generator().manual_seed(0)
    return Call((torch.randn(3, 7, WIDTH, generator=generator), torch.randn(3, 5, generator=generator)), {})


def found_in(block: Modulated) -> BlockEdges:
    return edges_of(block.requires_grad_(False), call())


@pytest.mark.parametrize(("order", "offset"), [("ba", 1.0), ("ab", 1.0), ("bag", 1.0), ("gab", 0.0), ("gba", 1.0)])
def test_parts_are_told_apart_whatever_their_order(order: str, offset: float) -> None:
    (edge,) = found_in(Modulated(order, offset)).edges
    assert (edge.sources, edge.sinks, edge.offset) == (("modulation",), ("up",), offset)
    assert edge.rows_I.tolist() == [order.index("a") * WIDTH + column for column in range(WIDTH)]
    assert edge.added_I is not None
    assert edge.added_I.tolist() == [order.index("b") * WIDTH + column for column in range(WIDTH)]


def test_no_edge_where_the_offset_has_nowhere_to_go() -> None:
    found = found_in(Modulated("ba", bias=False))
    assert not found.edges
    assert found.refused["modulation"] == "it modulates without a bias, which would have to take up the one that is added"
    assert found_in(Modulated("ba", 0.0, bias=False)).edges, "where nothing is added none is needed"


def test_no_edge_where_something_else_reads_it_too() -> None:
    found = found_in(Modulated("ba", shared=True))
    assert not found.edges
    assert found.refused["modulation"] == "the block's output reads it"


def test_fold_divides_what_multiplies_and_what_is_added() -> None:
    """Written out: channel c leaves the norm as n (1 + y_a) + y_b, and is to leave it divided by s_c."""
    block = Modulated("bag")
    (edge,) = found_in(block).edges
    x, conditions = call().args
    before, layer = block(x, conditions), block.modulation(conditions)
    scale_C = torch.rand(WIDTH) + 0.5
    fold(block, edge, scale_C)
    shift, scale, gate = layer.chunk(3, dim=-1)
    wanted = torch.cat([shift / scale_C, (1 + scale) / scale_C - 1, gate], dim=-1)
    torch.testing.assert_close(block.modulation(conditions), wanted)
    torch.testing.assert_close(block(x, conditions), before)


@pytest.mark.parametrize("name", ["dit", "flux", "sd3"])
def test_inputs_of_diffusion_transformers_are_smoothed(name: str) -> None:
    network, calls = opened(name), FAMILIES[name].calls(2)
    before = [output(network.module, call) for call in calls]
    modulated = [(name, edge) for name, found in network.edges.items() for edge in found.edges if edge.added_I is not None]
    sinks = {f"{block}.{sink}" for block, edge in modulated for sink in edge.sinks}
    weights = {sink: network.module.get_submodule(sink).get_parameter("weight").clone() for sink in sinks}
    assert {sink.rpartition(".")[2] for sink in sinks} >= {"to_q", "to_k", "to_v", "proj"}
    for block in Walk(network, calls):
        Smoothquant().compress(block)
    for sink, weight in weights.items():
        assert not torch.equal(network.module.get_submodule(sink).get_parameter("weight"), weight), sink
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=5e-5)
