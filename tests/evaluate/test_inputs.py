"""What 8 bits lose of inputs: literal sums over all that went in, for linears of tokens and convolutions of pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.errors import AerogelError
from aerogel.evaluate.inputs import Inputs, losses
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from tests.image_pipelines import classes, unconditional
from tests.tiny import opened

COUNT, STEPS = 2, 3


def given(network: Network, name: str) -> list[Tensor]:
    """What goes into a layer at each step, tokens (or pixels) by channels."""
    calls, seen = record(network.processor, network.module, Denoising(COUNT, STEPS, batch=COUNT)), []
    with torch.no_grad(), capture_inputs({name: network.module.get_submodule(name)}, lambda _, x: seen.append(x)):
        for call in calls:
            network.run(call)
    return [(x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2).double() for x in seen]


def rounded(x: float, low: float, high: float) -> float:
    """To the nearest of 256 numbers from low to high, one of which is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (min(max(round(x / scale + zero), 0), 255) - zero) * scale


def literal(steps: list[Tensor], kind: str) -> float:
    error = size = 0.0
    channels = [torch.cat([x_RC[:, channel] for x_RC in steps]) for channel in range(steps[0].shape[1])]
    everything = torch.cat([x_RC.flatten() for x_RC in steps])
    for x_RC in steps:
        for x_C in x_RC:
            for channel, x in enumerate(x_C.tolist()):
                size += x * x
                if kind == "token":
                    scale = float(x_C.abs().max()) / 127.5
                    near = min(max(round(x / scale), -128), 127) * scale
                else:
                    of = {"one": everything, "step": x_RC, "channel": channels[channel]}[kind]
                    near = rounded(x, float(of.min()), float(of.max()))
                error += (near - x) ** 2
    return error / size


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2", "pos_embed.proj"])
def test_errors_are_the_literal_ones(name: str) -> None:
    network = aerogel.load(classes())
    found = Inputs(COUNT, STEPS).measure(network, network)
    place, steps = found["layers"].index(name), given(network, name)
    for kind in ("one", "step", "channel", "token"):
        assert found[kind][place] == pytest.approx(literal(steps, kind), rel=0.02), kind


def test_every_layer_is_looked_at_and_the_network_is_left_alone() -> None:
    network = aerogel.load(unconditional())
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    found = Inputs(COUNT, STEPS).measure(network, network)
    layers = [name for name, part in network.module.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    assert sorted(found["layers"]) == sorted(layers)
    assert all(len(found[kind]) == len(layers) for kind in ("one", "step", "channel", "token"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.module.modules())


def test_what_stands_out_decides() -> None:
    torch.manual_seed(0)
    plain_RC, quiet = torch.randn(64, 8), torch.tensor(0.01)
    by_channel, by_token, by_step = plain_RC.clone(), plain_RC.clone(), torch.stack([plain_RC * quiet, plain_RC])
    by_channel[:, 0] *= 100
    by_token[0] *= 100
    for x_RC, worse, better in ((by_channel, "token", "channel"), (by_token, "channel", "token")):
        loss = losses(x_RC, x_RC.amin(0)[None], x_RC.amax(0)[None], 0)
        assert loss[better] < loss[worse] / 1.5
        assert loss[better] < loss["one"] / 1.5
    loss = losses(by_step[0], by_step.amin(1), by_step.amax(1), 0)
    assert loss["step"] < loss["one"] / 100


def test_what_cannot_be_looked_at_is_refused() -> None:
    network, broken = aerogel.load(classes()), aerogel.load(classes())
    with pytest.raises(AerogelError, match="count 0, steps 20: each is at least 1"):
        Inputs(count=0).measure(network, network)
    with pytest.raises(AerogelError, match="inputs compares with the original"):
        Inputs().measure(network)
    with pytest.raises(AerogelError, match="came without its pipeline"):
        Inputs().measure(opened("dit"), opened("dit"))
    with torch.no_grad():
        broken.module.get_submodule("transformer_blocks.0.attn1.to_v").weight[0] = torch.nan  # type: ignore[index,operator]
    with pytest.raises(AerogelError, match="of the original reads NaN or infinity"):
        Inputs(COUNT, STEPS).measure(network, broken)
