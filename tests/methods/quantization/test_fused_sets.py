"""Layers that engines load as one tensor: one global scale and one range of static inputs, whichever method rounds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import BlockMethod
from aerogel.methods.quantization.awq import Awq
from aerogel.methods.quantization.gptq import Gptq
from aerogel.methods.quantization.rtn import Rtn
from aerogel.methods.quantization.smoothquant import Smoothquant
from aerogel.model.block import Block
from aerogel.model.walk import Walk
from tests.tiny import FAMILIES, opened

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SETS = {
    "llama": [ATTENTION, ("mlp.gate_proj", "mlp.up_proj")],
    "mixtral": [ATTENTION, *((f"mlp.experts.{number}.w1", f"mlp.experts.{number}.w3") for number in range(4))],
}
NV: dict[str, Callable[..., BlockMethod]] = {
    "rtn": Rtn,
    "rtn, least error": lambda *given, **others: Rtn(*given, observer="mse", **others),
    "gptq": Gptq,
    "gptq, a pass for each stage": lambda *given, **others: Gptq(*given, true_sequential=True, max_activation_gb=0, **others),
    "awq": lambda *given, **others: Awq(*given, search_space=4, **others),
}
E2M1 = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])
"""Those with an even mantissa first: they win a tie."""


def first_block(family: str) -> Block:
    """The first block of a model in which the weights of a set differ in size, and norms have outliers."""
    network = opened(family)
    for name, parameter in network.module.named_parameters():
        if parameter.ndim == 1:
            parameter.data[::7] *= 6
        elif name.endswith(("k_proj.weight", "up_proj.weight", "w3.weight")):
            parameter.data *= 3
        elif name.endswith("v_proj.weight"):
            parameter.data *= 0.3
    return next(iter(Walk(network, FAMILIES[family].calls(3))))


def weights(block: Block, names: Iterable[str]) -> list[Tensor]:
    return [block.module.get_submodule(name).get_parameter("weight").detach().clone() for name in names]


def quantized(block: Block, name: str) -> QuantLinear:
    part = block.module.get_submodule(name)
    assert isinstance(part, QuantLinear)
    return part


def formula(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Global scale, block scales and values of NVFP4 for the concatenated weight, as vLLM and compressed-tensors define them."""
    whole = torch.cat(list(parts))
    total = 448 * 6 / whole.abs().max()
    runs = whole.unflatten(1, (-1, 16))
    scales = (runs.abs().amax(-1) / 6 * total).to(torch.float8_e4m3fn).float()
    step = (scales / total)[..., None]
    nearest = ((runs / step).abs()[..., None] - E2M1).abs().argmin(-1)
    return total, scales, (E2M1[nearest] * runs.sign() * step).flatten(1)


@pytest.mark.parametrize("family", SETS)
@pytest.mark.parametrize("method", NV)
def test_a_set_has_one_global_scale(method: str, family: str) -> None:
    block = first_block(family)
    before = {names: weights(block, names) for names in SETS[family]}
    NV[method]("NVFP4A16").compress(block)
    for names, parts in before.items():
        stored = [quantized(block, name).get_buffer("weight_global_scale") for name in names]
        assert all(torch.equal(one, stored[0]) for one in stored)
        if method != "awq":  # which scales weights first
            assert float(stored[0]) == float(formula(parts)[0])
    scales = {float(quantized(block, names[0]).get_buffer("weight_global_scale")) for names in SETS[family]}
    assert len(scales) == len(SETS[family]), "sets, and experts, have scales of their own"


@pytest.mark.parametrize("family", SETS)
def test_a_set_is_rounded_as_the_concatenated_weight(family: str) -> None:
    block = first_block(family)
    before = {names: weights(block, names) for names in SETS[family]}
    Rtn("NVFP4A16").compress(block)
    for names, parts in before.items():
        _, scales, values = formula(parts)
        assert torch.equal(torch.cat([quantized(block, name).get_buffer("weight_scale").float() for name in names]), scales)
        assert torch.equal(torch.cat([quantized(block, name).dequantized(torch.float32) for name in names]), values)


def test_awq_takes_the_scale_of_what_it_rounds() -> None:
    """Without clips the block scales are those of the scaled weight, which the edge's scale makes from the original one.

    Those of values are scaled for what reads them too, and are too small here to count for the global scale.
    """
    block = first_block("llama")
    before, norm = weights(block, ATTENTION), block.module.get_submodule("input_layernorm").get_parameter("weight").clone()
    Awq("NVFP4A16", clip=False).compress(block)
    scale = norm / block.module.get_submodule("input_layernorm").get_parameter("weight")
    assert not torch.allclose(scale, torch.ones_like(scale))
    total, scales, _ = formula([weight * scale for weight in before])
    found = [quantized(block, name) for name in ATTENTION[:2]]
    torch.testing.assert_close(found[0].get_buffer("weight_global_scale")[0], total)
    stored = torch.cat([layer.get_buffer("weight_scale").float() for layer in found])
    close = stored / scales[: len(stored)]
    assert float((close - 1).abs().max()) < 0.13, "at most one step of e4m3"


def test_layers_that_are_quantized_one_after_another_have_it_too() -> None:
    block = first_block("llama")
    parts = weights(block, ATTENTION)
    Rtn("NVFP4A16", targets=("*v_proj",)).compress(block)
    Gptq("NVFP4A16", targets=("*q_proj",)).compress(block)
    Awq("NVFP4A16", targets=("*k_proj",)).compress(block)
    assert {float(quantized(block, name).get_buffer("weight_global_scale")) for name in ATTENTION} == {float(formula(parts)[0])}


@pytest.mark.parametrize("sequential", [None, True])
def test_so_do_layers_that_are_given_copies_of_one_input(sequential: bool | None) -> None:
    """Then GPTQ does not see that they share it, and rounds them one after another."""
    block = first_block("llama")
    parts = weights(block, ATTENTION)
    block.module.get_submodule("self_attn.k_proj").register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    Gptq("NVFP4A16", true_sequential=sequential).compress(block)
    assert {float(quantized(block, name).get_buffer("weight_global_scale")) for name in ATTENTION} == {float(formula(parts)[0])}


def test_a_layer_in_no_set_has_a_scale_of_its_own() -> None:
    block = first_block("llama")
    parts = weights(block, ("mlp.down_proj",))
    Rtn("NVFP4A16").compress(block)
    assert float(quantized(block, "mlp.down_proj").get_buffer("weight_global_scale")) == float(formula(parts)[0])


def test_so_it_is_in_the_folder(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "model")
    recipe: dict[str, Any] = {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["*o_proj"]}}, {"rtn": {"scheme": "NVFP4A16"}}]}
    aerogel.compress(tmp_path / "model", recipe, output=tmp_path / "out", measures=())
    original, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    for layer in ("model.layers.0", "model.layers.1"):
        for names in SETS["llama"]:
            total, _, _ = formula([original[f"{layer}.{name}.weight"] for name in names])
            assert [float(saved[f"{layer}.{name}.weight_global_scale"]) for name in names] == [float(total)] * len(names)


STATIC: dict[str, Callable[[str], list[BlockMethod]]] = {
    "rtn": lambda scheme: [Rtn(scheme)],
    "gptq": lambda scheme: [Gptq(scheme)],
    "gptq, a pass for each stage": lambda scheme: [Gptq(scheme, true_sequential=True, max_activation_gb=0)],
    "awq": lambda scheme: [Awq(scheme, search_space=4)],
    "smoothquant": lambda scheme: [Smoothquant(), Rtn(scheme)],
}


def range_of_inputs(block: Block, name: str) -> tuple[float, float]:
    """The extremes of what goes into a layer, zero among them."""
    seen: list[Tensor] = []
    handle = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    for call in block.calls:
        block.run(call)
    handle.remove()
    return min(0.0, float(torch.cat(seen).min())), max(0.0, float(torch.cat(seen).max()))


@pytest.mark.parametrize("family", SETS)
@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_AFFINE", "FP8_STATIC"])
@pytest.mark.parametrize("method", STATIC)
def test_a_set_has_one_range_of_static_inputs(method: str, scheme: str, family: str) -> None:
    block = first_block(family)
    for step in STATIC[method](scheme):
        step.compress(block)
    for names in SETS[family]:
        layers: list[nn.Module] = [quantized(block, name) for name in names]
        for key in ("input_scale", "input_zero_point") if scheme == "W8A8_AFFINE" else ("input_scale",):
            assert all(torch.equal(layer.get_buffer(key), layers[0].get_buffer(key)) for layer in layers)
    low, high = range_of_inputs(block, ATTENTION[0])  # what queries read is made from the block's input, whatever is rounded behind it
    expected = {"W8A8_STATIC": max(-low, high) / 127.5, "W8A8_AFFINE": (high - low) / 255, "FP8_STATIC": max(-low, high) / 448}
    assert float(quantized(block, ATTENTION[0]).get_buffer("input_scale")) == pytest.approx(expected[scheme], rel=1e-5)


@pytest.mark.parametrize("family", SETS)
@pytest.mark.parametrize("method", NV)
def test_a_set_with_one_scale_a_tensor_has_one_for_all(method: str, family: str) -> None:
    """What engines would round again otherwise: they keep the largest scale of a set."""
    block = first_block(family)
    before = {names: weights(block, names) for names in SETS[family]}
    NV[method]("FP8_STATIC").compress(block)
    for names, parts in before.items():
        scales = [quantized(block, name).get_buffer("weight_scale") for name in names]
        assert all(torch.equal(one, scales[0]) for one in scales)
        if method != "awq":  # which scales weights first
            torch.testing.assert_close(scales[0].squeeze(), torch.cat(parts).abs().max() / 448)
