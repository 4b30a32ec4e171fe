"""Placement: names of devices, and moves that keep what is shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from aerogel.errors import AerogelError
from aerogel.model.activations import Activations
from aerogel.model.calls import Call
from aerogel.model.placement import HOST, Placement, find_device, host_memory, move
from tests import simulated_device
from tests.simulated_device import Watch
from tests.tiny import opened, output


@pytest.fixture
def watch() -> Iterator[Watch]:
    """An accelerator that torch reports."""
    with simulated_device.present() as found:
        yield found


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    assert find_device() == find_device("cpu") == find_device("cpu:0") == HOST
    with simulated_device.present():
        there = simulated_device.device()
        assert find_device() == find_device("simulated") == find_device("simulated:0") == find_device(there) == there
        assert find_device("cpu") == HOST
    assert find_device() == HOST


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1", r"device 'cuda:1' is not here: torch \S+ finds cpu only; give device auto, or one of these"),
        ("gpu", "device 'gpu' is unknown; give auto, cpu, cuda, cuda:1, mps or xpu"),
        ("meta", "device 'meta' is not here"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is here")
def test_a_device_that_is_not_here_is_refused(name: str, message: str) -> None:
    with pytest.raises(AerogelError, match=message):
        find_device(name)


def test_a_number_that_is_not_here_is_refused(watch: Watch) -> None:
    with pytest.raises(AerogelError, match="device 'simulated:3' is not here: there are 1 of simulated, numbered from 0"):
        find_device("simulated:3")
    with pytest.raises(AerogelError, match="finds cpu and simulated"):
        find_device("mps")


def test_calls_that_share_a_tensor_still_do(watch: Watch) -> None:
    text, place = torch.randn(2, 3), Placement.at(simulated_device.device())
    one, two = place.bring_calls([Call((), {"text": text, "at": 1}), Call((text, torch.randn(2)), {"on": True})])
    assert one.kwargs["text"] is two.args[0]
    assert (one.kwargs["at"], two.kwargs["on"]) == (1, True)
    assert watch.moved_in == {torch.Size((2, 3)): 1, torch.Size((2,)): 1}
    assert torch.equal(place.take_back(one.kwargs["text"]), text)
    assert place.bring(one.kwargs["text"]) is one.kwargs["text"]


def test_weights_that_are_shared_still_are(watch: Watch) -> None:
    network = opened("qwen2")
    module, there = network.module, simulated_device.device()
    assert module.lm_head.weight is module.model.embed_tokens.weight
    (call,) = [Call((), {"input_ids": torch.tensor([[3, 4, 5]]), "use_cache": False})]
    expected = output(module, call)
    move(module, there)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert {tensor.device for tensor in (*module.parameters(), *module.buffers())} == {there}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    torch.testing.assert_close(network.run(call).logits.cpu(), expected)
    move(module, HOST)
    assert torch.equal(output(module, call), expected)


def test_what_is_on_meta_stays_there(watch: Watch) -> None:
    module = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    move(module, simulated_device.device())
    assert [part.weight.device.type for part in module] == ["meta", "simulated"]


def test_weights_come_for_a_while(watch: Watch) -> None:
    module, place = nn.Linear(2, 2), Placement(simulated_device.device(), HOST)
    with place.resident(module):
        assert module.weight.device == place.device
    assert module.weight.device == HOST
    with Placement.at(HOST).resident(module):
        assert module.weight.device == HOST


def test_outputs_are_kept_on_the_host(watch: Watch) -> None:
    there = simulated_device.device()
    kept = Activations(placement=Placement.at(there))
    kept.put("block", 0, (torch.ones(2, 3).to(there), None))
    assert watch.moved_out == {torch.Size((2, 3)): 1}
    assert kept.get("block", 0)[0].device == there
    kept.fade("block", 1)
    assert kept.get("block", 0)[0].device == there
    assert torch.equal(kept.get("block", 0)[0].cpu(), torch.zeros(2, 3))


def test_memory_is_that_of_the_device(watch: Watch) -> None:
    watch.memory = 12345
    assert Placement.at(simulated_device.device()).memory() == 12345
    assert Placement().memory() == host_memory() > 1e8
