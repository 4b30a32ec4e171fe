"""Activations fused with quantized linears: the same numbers, in whatever mood the linear is; they come off and survive a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.activations import GEGLU, GELU
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.kernels import onepass
from aerogel.kernels.affine import Affine
from aerogel.layers.fused_activations import FusedGEGLU, FusedGELU, fuse
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.model.hooks import capture_inputs
from tests.image_pipelines import classes
from tests.methods.diffusion.test_fsc import calls
from tests.tiny import FAMILIES

STATIC = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"activation_ranges": {"start": "minmax", "steps": 0}}]}
WANTED = Denoising(2, 2, batch=2)


def compressed() -> nn.Module:
    pipeline = classes()
    return aerogel.compress(pipeline, STATIC, samples=WANTED, measures=()).network.module


def activations(module: nn.Module) -> list[GELU]:
    return [part for part in module.modules() if isinstance(part, GELU)]


def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([0, 7])}


def test_it_gives_what_the_two_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fused = compressed(), []
    plain = Affine.followed
    monkeypatch.setattr(Affine, "followed", lambda kernel, x, after: fused.append(after) or plain(kernel, x, after))
    monkeypatch.setattr("aerogel.kernels.linear.choose", lambda *_: "affine")
    assert [type(part) for part in activations(module)] == [FusedGELU]
    with torch.no_grad():
        together = module(**given()).sample
        assert fused == ["gelu_tanh"]
        monkeypatch.setattr(FusedGELU, "forward", GELU.forward)
        apart = module(**given()).sample
    assert fused == ["gelu_tanh"]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 600])
def test_a_gated_activation_gives_what_it_gave(rows: int) -> None:
    """Small inputs by torch's own operations, large ones by one pass."""
    tiny = FAMILIES["unet"]
    module = aerogel.compress(tiny.build(), STATIC, samples=calls(), measures=()).network.module
    part = next(part for part in module.modules() if isinstance(part, GEGLU))
    assert type(part) is FusedGEGLU
    x = torch.randn(1, rows, part.proj.in_features)
    with torch.no_grad():
        assert onepass.takes(part.proj(x)) == (rows == 600 and onepass.works())
        torch.testing.assert_close(part(x), GEGLU.forward(part, x), rtol=1e-5, atol=1e-6)
    x.requires_grad_()
    part(x).sum().backward()
    assert x.grad is not None


def test_who_looks_at_the_linear_sees_it_run() -> None:
    module, seen = compressed(), []
    (gelu,) = activations(module)
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = gelu(x)
        with capture_inputs({"proj": gelu.proj}, lambda name, _: seen.append(name)):
            torch.testing.assert_close(gelu(x), wanted)
        with cache_dequantized(gelu):
            torch.testing.assert_close(gelu(x), wanted, rtol=1e-4, atol=1e-4)
    assert seen == ["proj"]
    x.requires_grad_()
    gelu(x).sum().backward()
    assert x.grad is not None


def test_a_copy_and_a_saved_network_are_fused_too(tmp_path: Path) -> None:
    pipeline = classes()
    result = aerogel.compress(pipeline, STATIC, samples=WANTED, measures=(), output=tmp_path / "out")
    aerogel.register_diffusers()
    for module in (
        copy.deepcopy(result.network.module),
        aerogel.load(tmp_path / "out").module,
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out").transformer,
    ):
        assert [type(part) for part in activations(module)] == [FusedGELU]
        with torch.no_grad():
            assert torch.equal(module(**given()).sample, result.network.module(**given()).sample)


def test_floats_are_left_alone() -> None:
    transformer = classes().transformer
    fuse(transformer)
    (gelu,) = activations(transformer)
    assert type(gelu) is GELU
    gelu = FusedGELU(gelu)
    x = torch.randn(3, 16)
    assert torch.equal(gelu(x), nn.functional.gelu(gelu.proj(x), approximate="tanh"))
    assert not isinstance(gelu.proj, QuantLinear)
