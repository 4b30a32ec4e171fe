"""Quantized linears: compressed-tensors is the oracle for what they keep and for what they mean."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from packaging.version import Version
from pydantic import ValidationError
from torch import Tensor, nn

from aerogel.io.quantized import describe
from aerogel.layers.linear import QuantLinear, cache_dequantized, stored_grid
from aerogel.layers.scaled_input import ScaledInput
from aerogel.numerics.quantize import Grid, dequantize, quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.releases import DENSE, LIBRARY

BITS = (2, 3, 4, 8) if DENSE else (2, 4, 8)
INTEGER = [f"W{bits}A16{grain}{zero}" for bits in BITS for grain in ("_G32", "_CHANNEL") for zero in ("", "_ASYM")]
EIGHT_BIT = ["W8A8", "W8A8_STATIC", "W4A8_G32", "FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK"]
FOUR_BIT_FLOAT = ["NVFP4A16", "MXFP4A16"]
INPUTS, OUTPUTS = 256, 384


def quantized(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[QuantLinear, nn.Linear]:
    """A linear rounded to nearest, and the float one it was made from."""
    torch.manual_seed(0)
    scheme = Scheme.parse(name)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    grid = stored_grid(weight_grid(linear.weight, scheme.weights), dtype)
    static = Grid(torch.tensor(0.03125)) if scheme.inputs is not None and not scheme.inputs.dynamic else None
    return QuantLinear.from_codes(linear, scheme, quantize(linear.weight, grid, scheme.weights), grid, input_grid=static), linear


def oracle(linear: QuantLinear) -> tuple[type[BaseCompressor], QuantizationScheme]:
    """The library's compressor and scheme for what our config says of this linear."""
    config = describe(nn.Sequential(linear))
    assert config is not None
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    return BaseCompressor.get_value_from_registry(config["format"]), scheme


def local(linear: QuantLinear) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in linear.state_dict().items() if name != "bias"}


def same(left: Tensor, right: Tensor) -> bool:
    bits = [tensor.flatten().clone().view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and bits[0].equal(bits[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTEGER + EIGHT_BIT)
def test_the_library_decompresses_to_our_weight_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    ours, _ = quantized(name, dtype)
    compressor, scheme = oracle(ours)
    theirs = compressor.decompress(local(ours), scheme)["weight"]
    assert same(theirs, ours.dequantized(dtype))


@pytest.mark.parametrize("name", INTEGER + EIGHT_BIT)
def test_the_library_compresses_the_float_weight_to_our_tensors_bit_for_bit(name: str) -> None:
    ours, linear = quantized(name)
    compressor, scheme = oracle(ours)
    grid = ours.grid()
    given = {"weight": linear.weight.detach(), "weight_scale": local(ours)["weight_scale"]}
    given |= {} if grid.zero is None else {"weight_zero_point": grid.zero}
    theirs = compressor.compress(given, scheme)
    kept = {name: tensor for name, tensor in local(ours).items() if not name.startswith("input")}
    assert kept.keys() == theirs.keys()
    for tensor, value in kept.items():
        assert same(theirs[tensor], value), tensor


@pytest.mark.parametrize("name", FOUR_BIT_FLOAT)
def test_four_bit_floats_decompress_to_our_weight_bit_for_bit(name: str) -> None:
    ours, _ = quantized(name, torch.bfloat16)  # the library always answers in bfloat16 here
    compressor, scheme = oracle(ours)
    assert same(compressor.decompress(local(ours), scheme)["weight"], ours.dequantized(torch.bfloat16))


def test_activation_order_is_kept_as_group_indices() -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse("W4A16_G32")
    linear = nn.Linear(INPUTS, OUTPUTS)
    order = torch.randperm(INPUTS)
    g_idx = torch.empty(INPUTS, dtype=torch.int32)
    g_idx[order] = torch.arange(INPUTS, dtype=torch.int32) // 32
    grid = stored_grid(weight_grid(linear.weight[:, order], scheme.weights), torch.float32)
    codes = quantize(linear.weight, grid, scheme.weights, g_idx)
    ours = QuantLinear.from_codes(linear, scheme, codes, grid, g_idx=g_idx)
    if Version("0.19") > LIBRARY:
        compressor, args = oracle(ours)
        assert args.weights is not None
        assert args.weights.actorder == "group"
        assert same(compressor.decompress(local(ours), args)["weight"], ours.dequantized(torch.float32))
    else:
        with pytest.raises(ValidationError, match="actorder='group' has been removed"):
            oracle(ours)
    literal = torch.stack([(ours.codes()[:, i].float() * grid.scale[:, int(g_idx[i])]) for i in range(INPUTS)], dim=1)
    assert same(literal, ours.dequantized(torch.float32))


@pytest.mark.parametrize("name", INTEGER + EIGHT_BIT + FOUR_BIT_FLOAT)
def test_an_empty_one_takes_the_tensors_of_a_full_one(name: str) -> None:
    full, _ = quantized(name, torch.bfloat16)
    empty = QuantLinear.empty(INPUTS, OUTPUTS, True, full.scheme, torch.bfloat16, "meta")
    assert {key: (value.shape, value.dtype) for key, value in empty.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in full.state_dict().items()
    }
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 3, INPUTS)
    with cache_dequantized(empty), cache_dequantized(full):
        assert same(empty(x), full(x))


@pytest.mark.parametrize("name", ["W4A16_G32_ASYM", "W8A8", "FP8_STATIC"])
def test_forward_is_the_product_of_rounded_input_and_rounded_weight(name: str) -> None:
    ours, linear = quantized(name)
    x = torch.randn(2, 3, INPUTS)
    rounded = x.clone()
    if name == "W8A8":
        step = (x.abs().amax(-1, keepdim=True) * 2 / 255).float()
        rounded = (x / step).round().clamp(-128, 127) * step
    if name == "FP8_STATIC":
        rounded = (x / 0.03125).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.03125
    expected = rounded @ ours.dequantized(torch.float32).T + linear.bias
    assert (ours(x) - expected).norm() < 0.01 * expected.norm()  # by a kernel, which may multiply in bfloat16
    with cache_dequantized(ours):
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_made_on_a_stored_grid_mean_the_same_after_storing(dtype: torch.dtype) -> None:
    scheme = Scheme.parse("W4A16_G32")
    weight_OI = torch.randn(8, 64) * 1e-3
    weight_OI[0] = 0
    grid = stored_grid(weight_grid(weight_OI, scheme.weights), dtype)
    assert same(grid.scale, grid.scale.to(dtype).float())
    codes = quantize(weight_OI, grid, scheme.weights)
    ours = QuantLinear.from_codes(nn.Linear(64, 8), scheme, codes, grid, dtype=dtype)
    assert ours.state_dict()["weight_scale"].dtype == dtype
    assert same(ours.dequantized(torch.float32), dequantize(codes, grid, scheme.weights))


def test_a_scale_too_small_for_its_dtype_stays_positive() -> None:
    grid = stored_grid(Grid(torch.tensor([[1e-12], [1e9], [0.5]])), torch.float16)
    assert grid.scale.flatten().tolist() == [2.0**-24, 65504.0, 0.5]


@pytest.mark.parametrize("name", ["W4A16_G32", "FP8_DYNAMIC"])
def test_casting_a_model_rounds_neither_codes_nor_scales(name: str) -> None:
    ours, _ = quantized(name)
    before = {key: value.clone() for key, value in local(ours).items()}
    nn.Sequential(ours).to(torch.bfloat16).to(torch.float32)
    assert all(same(before[key], value) for key, value in local(ours).items())
    assert ours(torch.randn(1, INPUTS, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_held_weights_answer_the_same_and_are_let_go() -> None:
    ours, _ = quantized("W4A16_G32")
    x = torch.randn(4, INPUTS)
    assert ours.bias is not None
    expected = nn.functional.linear(x, ours.dequantized(torch.float32), ours.bias)
    with cache_dequantized(nn.Sequential(ours)):
        assert same(ours(x), expected)
        first = ours.dequantized_cache
        assert first is not None
        assert list(first) == [torch.float32]
        with cache_dequantized(ours):
            assert same(ours(x), expected)
        assert ours.dequantized_cache is first
    assert ours.dequantized_cache is None


def test_the_kernels_cache_lives_as_long_as_the_weight_it_was_packed_from() -> None:
    ours, _ = quantized("W4A16_G32")
    ours.cache["packed"] = 1
    assert ours.cache == {"packed": 1}
    assert "packed" not in ours.state_dict()
    state = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(state)
    assert ours.cache == {}
    ours.cache["packed"] = 2
    ours.to("meta")
    assert ours.cache == {}


def test_it_compiles_without_a_break() -> None:
    ours, _ = quantized("W4A16_G32_ASYM")
    x = torch.randn(2, INPUTS)
    with torch.no_grad(), cache_dequantized(ours):
        expected = ours(x)
    compiled = torch.compile(nn.Sequential(ours), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def test_scaled_input_divides_before_the_linear() -> None:
    ours, _ = quantized("W8A8")
    scale_I = torch.rand(INPUTS) + 0.5
    x = torch.randn(3, INPUTS)
    with cache_dequantized(ours):
        assert same(ScaledInput(ours, scale_I)(x), ours(x / scale_I))


def test_the_input_has_the_name_that_it_has_in_torch() -> None:
    ours, _ = quantized("W4A16_G32")
    x = torch.randn(3, INPUTS)
    assert same(ours(input=x), ours(x))
    scaled = ScaledInput(ours, torch.ones(INPUTS))
    assert same(scaled(input=x), ours(x))
