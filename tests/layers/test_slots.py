"""Slots: every stored tensor has its place, and what is shared stays shared whatever is put there."""

from __future__ import annotations

import torch
from torch import nn

from aerogel.layers.linear import QuantLinear
from aerogel.layers.slots import release, replace, slots
from aerogel.numerics.scheme import Scheme


def tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"embed": nn.Embedding(6, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 6)})
    net["head"].weight = net["embed"].weight
    net["norm"].register_buffer("table", torch.ones(4), persistent=False)
    net["norm"].register_parameter("nothing", None)
    return net


def test_places_are_those_of_the_state_dict() -> None:
    net = tied()
    assert [slot.name for slot in slots(net)] == list(net.state_dict())
    assert [slot.name for slot in slots(net["head"], "a.head")] == ["a.head.weight", "a.head.bias"]
    assert [slot.name for slot in slots(net, skip=[net["norm"]])] == ["embed.weight", "head.weight", "head.bias"]


def test_a_change_is_made_once_for_each_tensor() -> None:
    net = tied()
    net["head"].bias.requires_grad_(False)
    seen: list[str] = []
    replace(net, lambda slot: seen.append(slot.name) or slot.tensor.detach().double())
    assert seen == [name for name in net.state_dict() if name != "head.weight"]
    assert net["head"].weight is net["embed"].weight
    assert net["head"].weight.dtype == torch.float64
    assert isinstance(net["embed"].weight, nn.Parameter)
    assert not isinstance(net["norm"].running_mean, nn.Parameter)
    assert [net["embed"].weight.requires_grad, net["head"].bias.requires_grad] == [True, False]


def test_release_keeps_shapes_and_computed_buffers_and_drops_what_kernels_packed() -> None:
    net = tied()
    net["quantized"] = QuantLinear.empty(32, 8, True, Scheme.parse("W4A16_G32"), torch.float32)
    net["quantized"].cache["packed"] = torch.ones(8)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    release(net)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert net["norm"].table.tolist() == [1.0] * 4
    assert net["quantized"].cache == {}
