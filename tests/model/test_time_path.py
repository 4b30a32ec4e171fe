"""The temporal path: its members in published networks, its features in real forwards, and refusal where it is not of the step alone."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import nn

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from tests.tiny import FAMILIES, VARIANTS, opened

TINY = FAMILIES | VARIANTS
ATTENTION = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}

# As published; (builder, projections, sum of their widths, millions of parameters in the path).
PUBLISHED: dict[str, tuple[Any, int, int, float]] = {
    "stable-diffusion-1": (partial(diffusers.UNet2DConditionModel, cross_attention_dim=768), 22, 20_160, 27.9),
    "ldm-bedrooms": (
        partial(diffusers.UNet2DModel, block_out_channels=(224, 448, 672, 896), layers_per_block=2, norm_num_groups=32, **NO_ATTENTION),
        22, 12_992, 12.7,
    ),
    "ddim-cifar10": (
        partial(diffusers.UNet2DModel, block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_num_groups=32, **NO_ATTENTION),
        22, 4_992, 2.9,
    ),
}  # fmt: skip


def on_meta(build: Any) -> Network:
    with accelerate.init_empty_weights():
        module = build()
    return Network(module, catalog.find("families", "unet"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_members_are_those_of_published_networks(name: str) -> None:
    build, count, width, millions = PUBLISHED[name]
    path = time_path.find(on_meta(build))
    assert (len(path.projections), sum(path.widths.values())) == (count, width)
    assert path.parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert path.others == ()


@pytest.mark.parametrize("name", ["unet", "unet_pixels", "pixart", "cogvideox"])
def test_features_are_those_of_a_forward_and_see_no_image(name: str) -> None:
    network, calls = opened(name), TINY[name].calls(3)
    path = time_path.find(network)
    time_path.check(network, path, calls[0])
    steps = Trajectories.of(network, calls).distinct_steps
    assert steps == (900, 40, 600, 300)
    sinusoid_TC = time_path.sinusoids(network, path, calls[0], steps)
    for call in calls:  # of another image
        caught: dict[str, torch.Tensor] = {}
        handles = [module.register_forward_hook(partial(keep, caught, part)) for part, module in path.projections.items()]
        network.run(call)
        for handle in handles:
            handle.remove()
        rows = [steps.index(float(step)) for step in call.kwargs["timestep"]]
        features = path.features(sinusoid_TC[rows])  # a batch of the same shape: the same bits
        assert caught.keys() == features.keys()
        assert all(torch.equal(caught[part], features[part]) for part in caught)


def test_features_are_one_sample_of_each_step_in_the_order_of_a_forward() -> None:
    network, calls = opened("unet"), TINY["unet"].calls(3)
    path = time_path.find(network)
    steps = (40.0, 900.0, 7.0)
    found = time_path.features_of(network, calls[0], steps)
    sinusoid_TC = time_path.sinusoids(network, path, calls[0], steps)
    by_hand = path.features(sinusoid_TC)
    (embedder,) = path.embedders
    assert sorted(found) == sorted([embedder, *path.projections])
    names = [name for name in found if name != embedder]
    assert names == time_path.check(network, path, calls[0])
    assert [name.partition("_")[0] for name in names] == sorted(name.partition("_")[0] for name in names), "down, mid, up"
    for name in names:
        torch.testing.assert_close(found[name], by_hand[name], rtol=1e-5, atol=1e-5)
    assert found[embedder].shape[0] == len(steps)


def keep(caught: dict[str, torch.Tensor], name: str, _: nn.Module, __: Any, output: torch.Tensor) -> None:
    caught[name] = output


def test_resnets_that_resample_have_projections_too() -> None:
    path = time_path.find(opened("unet_pixels"))
    assert any("samplers" in name for name in path.projections)
    assert all(module.out_features == path.widths[name] for name, module in path.projections.items())


@pytest.mark.parametrize(
    ("build", "family", "reason"),
    [
        (FAMILIES["dit"].make, "dit", "the class label"),
        (partial(diffusers.UNet2DModel, block_out_channels=(32, 64), num_class_embeds=10, down_block_types=("DownBlock2D",) * 2,
                 up_block_types=("UpBlock2D",) * 2), "unet", "the class label"),
        (partial(diffusers.UNet2DConditionModel, addition_embed_type="text_time", projection_class_embeddings_input_dim=64,
                 addition_time_embed_dim=8), "unet", "the pooled text and the sizes"),
        (partial(diffusers.UNet2DConditionModel, time_cond_proj_dim=32), "unet", "the guidance scale"),
        (FAMILIES["sd3"].make, "sd3", "the pooled text"),
        (VARIANTS["flux_schnell"].make, "flux", "the pooled text"),
        (VARIANTS["cogvideox_i2v"].make, "cogvideox", "the offset (ofs)"),
    ],
    ids=["dit", "class", "sdxl", "distilled", "sd3", "flux", "cogvideox"],
)  # fmt: skip
def test_a_path_that_is_not_of_the_step_alone_is_refused_with_the_reason(build: Any, family: str, reason: str) -> None:
    with accelerate.init_empty_weights():
        module = build()
    path = time_path.find(Network(module, catalog.find("families", family)))
    assert path.others == (reason,)
    with pytest.raises(AerogelError, match=re.escape(reason)):
        path.require_alone()


def test_a_language_model_has_none() -> None:
    with pytest.raises(AerogelError, match="no layer of this llama model reads the time step and no image"):
        time_path.find(opened("llama"))


def test_a_projection_that_reads_something_else_is_found_out() -> None:
    network, (call,) = opened("unet"), FAMILIES["unet"].calls(1)
    path = time_path.find(network)
    resnet = network.module.get_submodule("mid_block.resnets.0")
    resnet.nonlinearity = nn.ReLU()
    with pytest.raises(AerogelError, match=r"mid_block.resnets.0.time_emb_proj does not read"):
        time_path.check(network, path, call)


def test_a_projection_that_is_never_reached_is_found_out() -> None:
    network, (call,) = opened("unet"), FAMILIES["unet"].calls(1)
    resnet = network.module.get_submodule("mid_block.resnets.0")
    assert isinstance(resnet, nn.Module)
    resnet.forward = lambda x, *_, **__: x  # type: ignore[method-assign]
    with pytest.raises(AerogelError, match=r"mid_block.resnets.0.time_emb_proj and 0 more .* never reached"):
        time_path.check(network, time_path.find(network), call)


def test_a_timestep_given_by_place_is_found() -> None:
    network, (call,) = opened("unet"), FAMILIES["unet"].calls(1)
    given = Call((call.kwargs["sample"], 40, call.kwargs["encoder_hidden_states"]))
    assert Trajectories.of(network, [given, call]).distinct_steps == (40, 900)
    path = time_path.find(network)
    by_place, by_name = (time_path.sinusoids(network, path, one, (7.0, 3.0)) for one in (given, call))
    assert torch.equal(by_place, by_name)
