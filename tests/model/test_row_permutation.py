"""Permutation of channels: found where rows can follow, and the block gives what it gave."""

from __future__ import annotations

import torch

from aerogel.model.row_permutation import movable, permute
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened


def test_the_rows_of_an_mlp_can_follow_and_those_of_heads_cannot() -> None:
    network, calls = opened("llama"), FAMILIES["llama"].calls(2)
    block = next(iter(Walk(network, calls)))
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    found = {edge.sinks: movable(block, edge) for edge in block.edges()}
    assert set(found[("mlp.down_proj",)]) == {"mlp.up_proj", "mlp.gate_proj"}
    assert [sinks for sinks, layers in found.items() if layers] == [("mlp.down_proj",)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.module.named_parameters())

    (edge,) = (edge for edge in block.edges() if edge.sinks == ("mlp.down_proj",))
    call = next(iter(block.calls))
    given = block.run(call)
    order = torch.randperm(len(edge.rows_I), generator=torch.Generator().manual_seed(1))
    permute(block.module, edge, found[edge.sinks], order)
    assert not torch.equal(block.module.get_parameter("mlp.down_proj.weight"), before["mlp.down_proj.weight"])
    same = block.run(call)
    torch.testing.assert_close(*((one[0] if isinstance(one, tuple) else one) for one in (same, given)))
    permute(block.module, edge, found[edge.sinks], order.argsort())
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.module.named_parameters())
