"""The trained Fashion UNet: TIAR keeps the temporal features that rounding to nearest and joint reconstruction lose; images follow."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.layers.linear import QuantLinear, timestep_index_of
from aerogel.methods.diffusion.tiar import features_with, temporal_error
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories

pytestmark = pytest.mark.quality

UNET = Path(__file__).parents[3] / "zoo/fashion-unet"
CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
STEPS, GUIDANCE = 20, 2.0
PATH = ["*time_emb*"]


@cache
def pipeline() -> Any:
    opened = diffusers.DiffusionPipeline.from_pretrained(UNET, dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


@cache
def calls() -> list[Call]:
    wanted = Denoising(count=10, steps=STEPS, guidance=GUIDANCE, prompts=CLASSES, batch=10)
    return record(pipeline(), pipeline().unet, wanted)


def compressed(*steps: dict[str, Any]) -> Network:
    return aerogel.compress(copy.deepcopy(pipeline().unet), {"steps": list(steps)}, samples=calls(), measures=()).network


def images(unet: torch.nn.Module) -> Tensor:
    made = diffusers.StableDiffusionPipeline(**{**pipeline().components, "unet": unet}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(100 + number) for number in range(10)]
    asked = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator, "output_type": "pt"}
    return made(list(CLASSES), **asked).images


@cache
def float_images() -> Tensor:
    return images(pipeline().unet)


def with_path_of(network: Network) -> torch.nn.Module:
    """The float UNet with the temporal path of another."""
    unet = copy.deepcopy(pipeline().unet)
    for name, part in network.module.named_modules():
        if isinstance(part, QuantLinear) and ("time_emb" in name):
            unet.set_submodule(name, part)
    return unet


def features_error(network: Network) -> tuple[float, float]:
    """(relative squared error of the temporal features, share of those nearer to another step's): over all steps and projections."""
    plain = aerogel.load(pipeline().unet)
    path = time_path.find(plain)
    steps = Trajectories.of(plain, calls()).distinct_steps
    sinusoid_TC = time_path.sinusoids(plain, path, calls()[0], steps)
    weights = {
        name: part.dequantized(torch.float32)
        for name, part in network.module.named_modules()
        if isinstance(part, QuantLinear) and "time_emb" in name
    }
    with torch.no_grad():
        wanted, given = path.features(sinusoid_TC), features_with(path, sinusoid_TC, weights)
        power = temporal_error({name: torch.zeros_like(feature) for name, feature in wanted.items()}, wanted)
        nearest = [torch.cdist(given[name], feature).argmin(1) for name, feature in wanted.items()]
        mismatched = torch.stack([(row != torch.arange(len(steps))).float().mean() for row in nearest]).mean()
        return float(temporal_error(given, wanted) / power), float(mismatched)


@cache
def path_only(method: str, bits: int) -> Network:
    scheme = f"W{bits}A16_CHANNEL_ASYM"
    if method == "joint":
        return compressed({"brecq": {"scheme": scheme, "steps": 100, "rate": 0.01, "targets": ["*resnets*", "time_embedding*"]}})
    return compressed({"tiar": {"scheme": scheme, "steps": 5000 if method == "tiar" else 0}})


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_tiar_keeps_the_features(bits: int) -> None:
    (nearest, lost), (learned, kept) = features_error(path_only("nearest", bits)), features_error(path_only("tiar", bits))
    assert learned < nearest / 3
    assert kept <= lost


@pytest.mark.slow
def test_joint_reconstruction_does_not_repair_the_path() -> None:
    joint, _ = features_error(path_only("joint", 4))
    learned, _ = features_error(path_only("tiar", 4))
    assert learned < joint / 3


def inputs_of_path() -> dict[str, Tensor]:
    """What goes into each linear of the path but the first, at every step: (T, width)."""
    plain = aerogel.load(pipeline().unet)
    path = time_path.find(plain)
    seen: dict[str, Tensor] = {}
    linears = {name: part for name, part in [*path.embedding_linears.items(), *path.projections.items()][1:] if isinstance(part, nn.Linear)}
    with capture_inputs(linears, lambda name, x: seen.update({name: x.detach()})), torch.no_grad():
        path.features(time_path.sinusoids(plain, path, calls()[0], Trajectories.of(plain, calls()).distinct_steps))
    return seen


def test_ranges_of_their_own_quantize_inputs_of_the_path_better() -> None:
    per_step = compressed({"rtn": {"scheme": "W8A16_CHANNEL", "targets": PATH, "ignore": ["*linear_1*"]}}, {"fsc": {}})
    ratios = []
    for name, x_TC in inputs_of_path().items():
        twin = per_step.module.get_submodule(name)
        assert isinstance(twin, QuantLinear)
        assert twin.timestep_index is not None
        low, high = min(float(x_TC.min()), 0.0), max(float(x_TC.max()), 0.0)
        shared = (high - low) / 255
        error, shared_error = 0.0, 0.0
        for row, x_C in enumerate(x_TC):
            with twin.timestep_index.at((row,)):
                grid = twin.input_grid()
                own = twin.quantized_input(x_C[None])[0]
            assert grid is not None
            assert float(grid.scale) <= shared * 1.001
            # Numbers at the ends of the range lose up to another half step to the zero point, which is whole.
            assert float((own - x_C).abs().max()) <= float(grid.scale) * 1.001
            codes = (x_C / shared + round(-low / shared)).round().clamp(0, 255)
            error += float((own - x_C).square().mean())
            shared_error += float(((codes - round(-low / shared)) * shared - x_C).square().mean())
        ratios.append(shared_error / error)
    assert min(ratios) >= 1.2


@pytest.mark.slow
def test_ranges_of_their_own_keep_the_features_of_8_bit_weights() -> None:
    rounded = {"rtn": {"scheme": "W8A16_CHANNEL", "targets": PATH}}
    per_step = compressed(rounded, {"fsc": {}})
    shared = compressed(rounded, {"activation_ranges": {"start": "minmax", "steps": 0, "targets": PATH}})
    plain = aerogel.load(pipeline().unet)
    steps = Trajectories.of(plain, calls()).distinct_steps
    sinusoid_TC = time_path.sinusoids(plain, time_path.find(plain), calls()[0], steps)
    with torch.no_grad():
        wanted = time_path.find(plain).features(sinusoid_TC)
        once = temporal_error(time_path.find(shared).features(sinusoid_TC), wanted)
        clock, path = timestep_index_of(per_step.module), time_path.find(per_step)
        assert clock is not None
        rows = []
        for row in range(len(steps)):
            with clock.at((row,)):
                rows.append(path.features(sinusoid_TC[row : row + 1]))
        each = temporal_error({name: torch.cat([row[name] for row in rows]) for name in wanted}, wanted)
    assert float(each) < float(once)


@pytest.mark.slow
def test_reconstruction_of_the_whole_network_in_4_bits() -> None:
    scheme = "W4A16_CHANNEL_ASYM"
    nearest = compressed({"rtn": {"scheme": scheme, "targets": ["Linear", "Conv2d"]}})
    learned = compressed({"brecq": {"scheme": scheme, "steps": 200, "rate": 0.01}})
    error = [float((images(network.module) - float_images()).square().mean()) for network in (nearest, learned)]
    assert error[1] < error[0] / 2


@pytest.mark.slow
def test_images_of_a_quantized_path() -> None:
    """The rest of the network is float; noise is the same; fsc has 8-bit inputs where the others have float ones."""
    unets = {method: with_path_of(path_only(method, 4)) for method in ("nearest", "joint", "tiar")}
    unets["tiar and fsc"] = compressed({"tiar": {}}, {"fsc": {}}).module
    error = {method: float((images(unet) - float_images()).square().mean()) for method, unet in unets.items()}
    for method in ("tiar", "tiar and fsc"):
        assert error[method] < error["nearest"] / 5
        assert error[method] < error["joint"]
