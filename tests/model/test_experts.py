"""Unfused experts answer as the fused ones, bear the checkpoint's names, and go back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from aerogel.io.layouts import as_on_disk
from aerogel.io.names import Names
from aerogel.layers.experts import ExpertList
from aerogel.model.experts import fuse, unfuse
from tests.saved import round_to_nearest
from tests.tiny import FAMILIES, output

MIXTURES = ["deepseek_v3", "gpt_oss", "internvl", "mixtral", "qwen3_moe", "qwen3_vl_moe"]


def opened(name: str) -> tuple[nn.Module, Names]:
    network = FAMILIES[name].build()
    return network, Names.of(network)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_outputs_are_those_of_the_fused_experts(name: str, implementation: str) -> None:
    network, names = opened(name)
    getattr(network.model, "language_model", network).set_experts_implementation(implementation)
    calls = FAMILIES[name].calls(3)
    before = [output(network, call) for call in calls]
    assert unfuse(network, names.experts)
    for call, expected in zip(calls, before, strict=True):
        exact = implementation == "eager" and name != "gpt_oss"  # a product of columns in turns sums in another order
        torch.testing.assert_close(output(network, call), expected, rtol=0, atol=0 if exact else 2e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_way_back_is_exact(name: str) -> None:
    network, names = opened(name)
    original, call = FAMILIES[name].build(), FAMILIES[name].calls(1)[0]
    unfused = unfuse(network, names.experts)
    assert fuse(network) == unfused
    assert network.state_dict().keys() == original.state_dict().keys()
    for key, tensor in original.state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor), key
    assert torch.equal(output(network, call), output(original, call))
    assert [type(part) for part in network.modules()] == [type(part) for part in original.modules()]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_names_on_disk_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    network, names = opened(name)
    network.save_pretrained(tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    unfuse(network, names.experts)
    ours = dict(as_on_disk(network, network.state_dict().items()))
    tied = {"lm_head.weight"} - {names.in_memory(key) for key in stored}
    assert {names.on_disk(key) for key in ours.keys() - tied} == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(ours[names.in_memory(key)], tensor), key
    assert all(names.in_memory(key) == key for key in ours)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_runs_on_its_own_tokens_only(name: str) -> None:
    network, names = opened(name)
    (first, *_) = unfuse(network, names.experts)
    experts = network.get_submodule(first)
    assert isinstance(experts, ExpertList)
    seen: dict[int, torch.Tensor] = {}
    for number, expert in enumerate(experts):
        expert.linears[0].register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0]}))
    hidden = torch.randn(5, 64)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 4], [2, 4], [0, 2]])  # 1 and 3 get no token; 4 is nobody
    result = experts(hidden, chosen, torch.full((5, 2), 0.5))
    assert seen.keys() == {0, 2}
    assert torch.equal(seen[0], hidden[[0, 1, 2, 4]])
    assert torch.equal(seen[2], hidden[[0, 1, 3, 4]])
    torch.testing.assert_close(result[2], 0.5 * experts[0](hidden[2:3])[0])


@pytest.mark.parametrize("name", MIXTURES)
def test_meta_weights_stay_on_meta(name: str) -> None:
    network, names = opened(name)
    unfuse(network.to("meta"), names.experts)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert [*network.state_dict()] == [*_unfused(name).state_dict()]


def test_quantized_experts_stay_apart() -> None:
    network = _unfused("mixtral")
    round_to_nearest(network.get_submodule("model.layers.0.mlp.experts.1"), "W4A16_G32")
    expected = output(network, FAMILIES["mixtral"].calls(1)[0])
    assert fuse(network) == ["model.layers.1.mlp.experts"]
    assert isinstance(network.get_submodule("model.layers.0.mlp.experts"), ExpertList)
    torch.testing.assert_close(output(network, FAMILIES["mixtral"].calls(1)[0]), expected, rtol=0, atol=2e-6)


def test_memory_of_the_fused_weights_is_let_go() -> None:
    network = _unfused("mixtral")
    storages = [linear.weight.untyped_storage().nbytes() for linear in network.modules() if isinstance(linear, nn.Linear)]
    weights = [linear.weight.nbytes for linear in network.modules() if isinstance(linear, nn.Linear)]
    assert storages == weights


def test_experts_of_an_unknown_layout_stay_as_they_are() -> None:
    network, names = opened("mixtral")
    experts = network.get_submodule("model.layers.1.mlp.experts")
    experts.down_proj_bias = nn.Parameter(torch.zeros(4, 64))
    assert unfuse(network, names.experts) == ["model.layers.0.mlp.experts"]
    assert network.get_submodule("model.layers.1.mlp.experts") is experts


def _unfused(name: str) -> nn.Module:
    network, names = opened(name)
    unfuse(network, names.experts)
    return network
