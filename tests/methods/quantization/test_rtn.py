"""Round to nearest: codes by the definition, static input ranges, overrides, and no call where none is needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aerogel.layers.linear import QuantLinear
from aerogel.methods.quantization.rtn import Rtn
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened, output


class NoCalls:
    """Fails when anybody looks."""

    def __iter__(self) -> Iterator[Call]:
        raise AssertionError("a method without needs looked at calls")

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("name", ["W3A16_G32", "W4A16_CHANNEL", "W8A8"])
def test_codes_are_by_definition(name: str) -> None:
    network = opened("llama")
    module = network.blocks()["model.layers.0"]
    before = {part: linear.weight.clone() for part, linear in Block("b", module, 0, 2, NoCalls(), network).linears().items()}
    Rtn(name).compress(Block("model.layers.0", module, 0, 2, NoCalls(), network))
    bits = int(name[1])
    for part, weight in before.items():
        linear = module.get_submodule(part)
        assert isinstance(linear, QuantLinear)
        size = 32 if name.endswith("G32") else weight.shape[1]
        groups = weight.unflatten(1, (-1, size))
        scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(linear.codes().float(), codes.flatten(1))


def test_overrides_and_ignore_decide_layer_by_layer() -> None:
    network = opened("llama")
    module = network.blocks()["model.layers.0"]
    block = Block("model.layers.0", module, 0, 2, NoCalls(), network)
    Rtn("W4A16_G32", ignore=("*o_proj",), overrides={"*down_proj": "W8A16_CHANNEL"}).compress(block)
    assert not isinstance(module.get_submodule("self_attn.o_proj"), QuantLinear)
    assert str(module.get_submodule("mlp.down_proj").scheme) == "W8A16_CHANNEL"
    assert str(module.get_submodule("mlp.up_proj").scheme) == "W4A16_G32"


@pytest.mark.parametrize("rule", ["absmax", "average"])
def test_static_ranges_come_from_all_calls(rule: str) -> None:
    network, calls = opened("llama"), FAMILIES["llama"].calls(3)
    block = next(iter(Walk(network, calls)))
    seen = []
    hook = block.module.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[operator, union-attr]
    for call in block.calls:
        block.run(call)
    hook.remove()
    Rtn("W8A8_STATIC", input_range=rule).compress(block)  # type: ignore[arg-type]
    grid = block.module.get_submodule("self_attn.q_proj").input_grid()
    lows, highs = torch.stack([x.min() for x in seen]), torch.stack([x.max() for x in seen])
    low, high = (lows.min(), highs.max()) if rule == "absmax" else (lows.mean(), highs.mean())
    assert float(grid.scale) == pytest.approx(float(torch.maximum(-low, high)) / 127.5, rel=1e-6)


def test_static_inputs_of_a_linear_without_tokens_are_noted() -> None:
    network = opened("mixtral")
    walk = Walk(network, [Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})])
    block = next(iter(walk))
    Rtn("W8A8_STATIC").compress(block)
    silent = [note["name"] for note in block.notes if "no token" in note.get("fallback", "")]
    assert len(silent) == 6  # one token meets two of four experts


def test_searched_ranges_have_less_error() -> None:
    def error(observer: str) -> float:
        network, calls = opened("llama"), FAMILIES["llama"].calls(2)
        before = [output(network.module, call) for call in calls]
        for name, module in network.blocks().items():
            Rtn("W3A16_G32", observer=observer).compress(Block(name, module, 0, 2, NoCalls(), network))  # type: ignore[arg-type]
        return float(sum((output(network.module, call) - exact).square().sum() for call, exact in zip(calls, before, strict=True)))

    assert error("mse") < error("minmax")


def test_calls_are_needed_for_static_inputs_only() -> None:
    assert Rtn("W8A8").requires == {"uncached"}
    assert Rtn("W8A8_STATIC").requires == Rtn("W4A16", overrides={"*down_proj": "FP8_STATIC"}).requires == {"calls", "uncached"}
