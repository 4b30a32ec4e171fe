"""The trained Fashion UNet: TIAR keeps the temporal features that rounding to nearest and joint reconstruction lose; images follow."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.methods.diffusion.tiar import features_with, temporal_error
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.clock import steps_of
from aerogel.model.modules import QuantLinear
from aerogel.model.network import Network

pytestmark = pytest.mark.quality

UNET = Path(__file__).parents[3] / "zoo/fashion-unet"
CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
STEPS, GUIDANCE = 20, 2.0


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
    steps = steps_of(plain.module, calls())
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


@pytest.mark.parametrize("bits", [4, 3])
def test_tiar_keeps_the_features(bits: int) -> None:
    (nearest, lost), (learned, kept) = features_error(path_only("nearest", bits)), features_error(path_only("tiar", bits))
    assert learned < nearest / 3
    assert kept <= lost


def test_joint_reconstruction_does_not_repair_the_path() -> None:
    joint, _ = features_error(path_only("joint", 4))
    learned, _ = features_error(path_only("tiar", 4))
    assert learned < joint / 3


def test_images_of_a_quantized_path() -> None:
    """The rest of the network is float; noise is the same."""
    unets = {method: with_path_of(path_only(method, 4)) for method in ("nearest", "joint", "tiar")}
    error = {method: float((images(unet) - float_images()).square().mean()) for method, unet in unets.items()}
    assert error["tiar"] < error["nearest"] / 5
    assert error["tiar"] < error["joint"]
