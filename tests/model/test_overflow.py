"""The first tensor of a forward that is not finite is named, with its size in float32."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.engine.teacher import residency_of
from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.overflow import first_overflow, require_finite
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened

UP, DOWN, HEAD = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"


def half(**factors: float) -> torch.nn.Module:
    """The tiny Llama in float16 with some weights multiplied."""
    module = FAMILIES["llama"].build().half()
    with torch.no_grad():
        for name, factor in factors.items():
            module.get_submodule(name.replace("__", ".")).weight.mul_(factor)
    return module


@pytest.mark.parametrize(
    ("changed", "name", "side"),
    [
        ({DOWN: 1e5}, DOWN, "output"),
        ({UP: 3e3, "model.layers.1.mlp.gate_proj": 3e3}, DOWN, "input"),
        ({HEAD: 6e4}, HEAD, "output"),
        ({DOWN: 0.0, "model.layers.0.mlp.down_proj": 1.0}, None, None),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_the_first_is_named_with_its_size(changed: dict[str, float], name: str | None, side: str | None, streamed: bool) -> None:
    network, (call,) = opened("llama"), FAMILIES["llama"].calls(1)
    network.module = half(**{key.replace(".", "__"): factor for key, factor in changed.items()})
    found = first_overflow(network, call, residency_of(network) if streamed else None)
    if name is None:
        assert found is None
        return
    assert found is not None
    assert (found.name, found.side, found.dtype) == (name, side, torch.float16)
    seen: list[float] = []
    part = network.module.float().get_submodule(name)
    part.register_forward_hook(lambda _, args, output: seen.append(float((args[0] if side == "input" else output).abs().max())))
    network.run(call)
    assert 65504 < seen[0] < math.inf
    assert found.largest == pytest.approx(seen[0], rel=0.02)
    assert str(found.error) == (
        f"{name}: its {side} overflows in float16: {found.largest:.5g} in float32, and float16 ends at 65,504; "
        "compute in bfloat16 (--dtype bfloat16) or float32"
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.module.modules() if module is not part)


def test_a_block_without_layers_that_overflow_is_named_itself() -> None:
    network, (call,) = opened("llama"), FAMILIES["llama"].calls(1)
    network.module = half()
    with torch.no_grad():
        for layer in (0, 1):  # each sum fits, and that of both does not
            network.module.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight.fill_(0)
        network.module.get_submodule("model.embed_tokens").weight.fill_(6e4)
        network.module.get_submodule("model.layers.0.self_attn.o_proj").weight.fill_(0)
    assert first_overflow(network, call) is None
    with torch.no_grad():
        network.module.get_submodule("model.layers.0.post_attention_layernorm").weight.fill_(0)
        down = network.module.get_submodule("model.layers.0.mlp.down_proj")
        down.bias = torch.nn.Parameter(torch.full((down.out_features,), 6e4).half())
    found = first_overflow(network, call)
    assert found is not None
    assert (found.name, found.side) == ("model.layers.0", "output")
    assert found.largest == pytest.approx(1.2e5, rel=0.01)


def test_a_walk_stops_at_a_block_that_is_not_finite() -> None:
    network, calls = opened("llama"), FAMILIES["llama"].calls(2)
    with torch.no_grad():
        network.module.get_submodule(UP).weight.fill_(3e38)
    with pytest.raises(AerogelError, match=rf"^{UP}: its output is not finite \(largest magnitude inf\); check the weights"):
        list(Walk(network, calls))


def test_masks_may_be_infinite() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, mask

    x, mask = torch.ones(2, 3), torch.full((2, 3), -torch.inf)
    require_finite("a", Masked(), Call((x, mask)), (x, mask))
    with pytest.raises(AerogelError, match=r"^a: its input is not finite"):
        require_finite("a", Masked(), Call((mask, mask)), (mask, mask))
