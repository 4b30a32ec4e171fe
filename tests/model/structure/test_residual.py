"""The residual stream is found where there is one, by the definition, and the reason is named where there is none."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.model.network import Network
from aerogel.model.structure.residual import Residual
from tests.tiny import FAMILIES, VARIANTS, opened, output

TINY = FAMILIES | VARIANTS
WITHOUT = {
    **dict.fromkeys(("gemma2", "gemma3", "dit", "pixart", "wan", "wan_i2v", "cogvideox", "cogvideox_i2v"), "passes a norm or a gate"),
    **dict.fromkeys(("sd3", "sd3_medium"), "passes a norm or a gate"),
    **dict.fromkeys(("flux", "flux_schnell"), "passes a norm or a gate"),
    **dict.fromkeys(("unet", "unet_pixels"), "no input of a block has the shape of an output"),
    "opt_350m": "a norm comes after the sum",
}


@pytest.mark.parametrize("name", sorted(TINY.keys() - WITHOUT.keys()))
def test_turning_what_enters_and_undoing_it_before_what_reads_changes_nothing(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(2)
    assert isinstance(network.residual, Residual)
    turn_HH = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    if network.residual.keeps_mean:
        mean_H = torch.full((64,), 1 / 8)
        axis_H = turn_HH.T @ mean_H - mean_H
        turn_HH = turn_HH - 2 * torch.outer(turn_HH @ axis_H, axis_H) / axis_H.square().sum()
        torch.testing.assert_close(mean_H @ turn_HH, mean_H)
    before = [output(network.module, call) for call in calls]
    with ExitStack() as stack:
        turned(network, network.residual, turn_HH, stack)
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=5e-5)


def turned(network: Network, stream: Residual, turn_HH: Tensor, stack: ExitStack) -> None:
    """Turn what enters the stream; turn it back before every norm that reads it, and before layers that read it without one."""
    find = network.module.get_submodule

    def after(_: nn.Module, __: Any, result: Tensor) -> Tensor:
        return result @ turn_HH

    def back(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] @ turn_HH.T, *args[1:])

    for name in (*(table.removesuffix(".weight") for table in stream.tables), *stream.writers):
        stack.callback(find(name).register_forward_hook(after).remove)
    behind_norms = {sink for edge in stream.norms for sink in edge.sinks}
    for name in (*(edge.sources[0] for edge in stream.norms), *(name for name in stream.readers if name not in behind_norms)):
        stack.callback(find(name).register_forward_pre_hook(back).remove)


@pytest.mark.parametrize(("name", "why"), WITHOUT.items())
def test_the_reason_is_named_where_there_is_none(name: str, why: str) -> None:
    assert why in str(opened(name).residual)


def test_a_layer_that_did_not_run_may_touch_it() -> None:
    network = opened("llama")
    network.module.model.image_projector = nn.Linear(32, 64)
    assert network.residual == "model.image_projector did not run and may touch it"


def test_names_are_those_of_the_paper() -> None:
    stream = opened("llama").residual
    assert isinstance(stream, Residual)
    assert (stream.width, stream.keeps_mean, stream.tables, stream.vectors) == (64, False, ("model.embed_tokens.weight",), ())
    assert set(stream.writers) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert "lm_head" in stream.readers
    assert {edge.sources[0]: edge.sinks for edge in stream.norms}["model.norm"] == ("lm_head",)
    positions = opened("opt").residual
    assert isinstance(positions, Residual)
    assert positions.keeps_mean  # LayerNorm takes the mean away
    assert positions.tables == ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight")
    experts = opened("qwen3_moe").residual
    assert isinstance(experts, Residual)
    assert {f"model.layers.1.mlp.experts.{number}.down_proj" for number in range(4)} < set(experts.writers)
