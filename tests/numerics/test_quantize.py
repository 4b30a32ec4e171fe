"""Codes, grids and their gradients: bit for bit with compressed-tensors, and against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import dequantize as their_dequantize
from compressed_tensors.quantization import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import AerogelError
from aerogel.numerics.formats import FORMATS
from aerogel.numerics.quantize import Grid, dequantize, dynamic_grid, expand, fake_quantize, grid_from_range, grouped, quantize, weight_grid
from aerogel.numerics.scheme import PerBlock, PerChannel, PerGroup, PerHead, PerTensor, PerToken, Scheme, TensorScheme

INT4 = FORMATS["int4"]


def weight(rows: int = 8, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 1, rows)[:, None]


def theirs(scheme: TensorScheme) -> QuantizationArgs:
    granularity = scheme.granularity
    strategy = {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group", PerBlock: "block", PerToken: "token"}[type(granularity)]
    dtype = {"float": None, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}[scheme.scale_format]
    return QuantizationArgs(
        num_bits=scheme.format.bits,
        type=scheme.format.kind,
        symmetric=scheme.symmetric,
        strategy="tensor_group" if scheme.scale_format == "e4m3" else strategy,
        group_size=granularity.size if isinstance(granularity, PerGroup) else None,
        block_structure=[granularity.rows, granularity.columns] if isinstance(granularity, PerBlock) else None,
        dynamic=scheme.dynamic,
        scale_dtype=dtype,
    )


def assert_same_as_theirs(x: torch.Tensor, scheme: TensorScheme, grid: Grid, low: torch.Tensor, high: torch.Tensor) -> None:
    """`low` and `high` are the ranges that compressed-tensors is told."""
    args = theirs(scheme)
    with torch.compiler.set_stance("force_eager"):  # the library compiles its fp4 rounding
        outer = generate_gparam(low.amin(), high.amax()) if scheme.scale_format == "e4m3" else None
        scale, zero = calculate_qparams(low, high, args, global_scale=outer)
        values = their_quantize(x, scale, zero, args, global_scale=outer)
        back = their_dequantize(values, scale, zero, args, global_scale=outer)
    assert torch.equal(grid.scale.flatten(), scale.flatten())
    if grid.zero is not None:
        assert torch.equal(grid.zero.flatten(), zero.flatten())
    if outer is not None:
        assert grid.outer is not None
        assert torch.equal(grid.outer.flatten(), outer)
    codes = quantize(x, grid, scheme)
    assert codes.dtype == scheme.format.storage
    if scheme.format.levels is None:
        assert torch.equal(codes.float(), values.float())
    assert torch.equal(dequantize(codes, grid, scheme), back)


INTEGERS = [
    TensorScheme(FORMATS[f"int{bits}"], granularity, symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), PerGroup(32))
]
FLOATS = [Scheme.parse(name).weights for name in ("FP8_STATIC", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16")]


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=lambda s: f"{s.format}-{s.granularity}-{s.symmetric}")
def test_weights_match_compressed_tensors(scheme: TensorScheme) -> None:
    x = weight()
    runs = {PerTensor: x.flatten(), PerChannel: x[:, None]}.get(type(scheme.granularity))
    if runs is None:
        runs = x.reshape(len(x), -1, scheme.granularity.size)  # type: ignore[union-attr]
    assert_same_as_theirs(x, scheme, weight_grid(x, scheme), runs.amin(-1), runs.amax(-1))


@pytest.mark.parametrize("shape", [(256, 256), (200, 300)])
def test_blocks_match_compressed_tensors(shape: tuple[int, int]) -> None:
    scheme = Scheme.parse("FP8_BLOCK").weights
    x = weight(*shape)
    tiles = [[x[r : r + 128, c : c + 128] for c in range(0, shape[1], 128)] for r in range(0, shape[0], 128)]
    low = torch.tensor([[float(tile.min()) for tile in row] for row in tiles])
    high = torch.tensor([[float(tile.max()) for tile in row] for row in tiles])
    assert_same_as_theirs(x, scheme, weight_grid(x, scheme), low, high)


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC"])
def test_tokens_match_compressed_tensors(preset: str) -> None:
    scheme = Scheme.parse(preset).inputs
    assert scheme is not None
    x = torch.stack((weight(5), weight(5, seed=1)))
    grid = dynamic_grid(x, scheme)
    assert grid.scale.shape == (2, 5, 1)
    assert_same_as_theirs(x, scheme, grid, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.integers(1, 9),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
)
def test_groups_follow_the_formula_written_out(bits: int, symmetric: bool, size: int, values: list[float]) -> None:
    """One number at a time; the last group may be short."""
    scheme = TensorScheme(FORMATS[f"int{bits}"], PerGroup(size), symmetric)
    x = torch.tensor([values])
    grid = weight_grid(x, scheme)
    codes, back = quantize(x, grid, scheme), dequantize(quantize(x, grid, scheme), grid, scheme)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert grid.scale.shape == (1, math.ceil(len(values) / size))
    for i, value in enumerate(x[0]):
        run = x[0, i // size * size : i // size * size + size]
        low, high = run.min().clamp(max=0), run.max().clamp(min=0)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = span / (2**bits - 1) if span > 0 else torch.tensor(torch.finfo(torch.float32).eps)
        if scale == 0:  # a subnormal range
            scale = torch.tensor(torch.finfo(torch.float32).eps)
        zero = torch.tensor(0.0) if symmetric else (lowest - low / scale).clamp(lowest, highest).round()
        code = (value / scale + zero).clamp(lowest, highest).round()
        assert codes[0, i] == code
        assert back[0, i] == (code - zero) * scale
        if scale >= torch.finfo(torch.float32).tiny:  # a subnormal scale is itself rounded by up to a half
            assert abs(back[0, i] - value) <= scale * 1.001


@pytest.mark.parametrize("code", range(8))
def test_fp4_rounds_ties_to_the_even_mantissa(code: int) -> None:
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    scheme = TensorScheme(FORMATS["fp4_e2m1"], PerTensor())
    one = Grid(torch.tensor(1.0))
    between = (levels[code] + levels[min(code + 1, 7)]) / 2
    expected = code if code % 2 == 0 else min(code + 1, 7)
    assert quantize(torch.tensor([levels[code], -levels[code] - 0.01, between, 99.0]), one, scheme).tolist() == [
        code,
        code + 8,
        expected,
        7,
    ]
    assert dequantize(torch.tensor([code, code + 8], dtype=torch.uint8), one, scheme).tolist() == [levels[code], -levels[code]]


def test_e5m2_uses_its_whole_range() -> None:
    scheme = TensorScheme(FORMATS["fp8_e5m2"], PerChannel())
    x = weight()
    grid = weight_grid(x, scheme)
    assert torch.equal(grid.scale, x.abs().amax(-1, keepdim=True) / 57344)
    error = (dequantize(quantize(x, grid, scheme), grid, scheme) - x).abs()
    assert bool((error <= x.abs() / 8 + 1e-9).all())  # two mantissa bits
    assert float(error.max()) > 0


def test_heads_have_a_scale_each() -> None:
    scheme = TensorScheme(FORMATS["int8"], PerHead())
    keys = torch.randn(2, 3, 5, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    grid = dynamic_grid(keys, scheme)
    assert torch.equal(grid.scale.flatten(), torch.stack([keys[:, head].abs().max() for head in range(3)]) / 127.5)
    assert torch.allclose(dequantize(quantize(keys, grid, scheme), grid, scheme), keys, rtol=0, atol=float(grid.scale.max()))


@pytest.mark.parametrize("scheme", INTEGERS[:6] + FLOATS, ids=lambda s: f"{s.format}-{s.granularity}-{s.symmetric}")
def test_zeros_stay_zeros(scheme: TensorScheme) -> None:
    x = torch.zeros(4, 64)
    grid = weight_grid(x, scheme)
    assert bool((grid.scale > 0).all())
    assert torch.equal(dequantize(quantize(x, grid, scheme), grid, scheme), x)


def test_an_outer_scale_can_be_shared() -> None:
    scheme = Scheme.parse("NVFP4A16").weights
    q, k = weight(seed=1), weight(seed=2) * 3
    outer = weight_grid(torch.cat((q, k)), scheme).outer
    runs = grouped(q, scheme.granularity)
    grid = grid_from_range(runs.amin(-1), runs.amax(-1), scheme, outer)
    assert grid.outer is outer
    assert torch.equal(grid.scale, weight_grid(torch.cat((q, k)), scheme).scale[: len(q)])


def test_columns_may_name_their_group() -> None:
    """Activation order: column i belongs to group g_idx[i]."""
    scheme = TensorScheme(INT4, PerGroup(32), symmetric=False)
    x = weight()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    grid = weight_grid(x[:, order], scheme)
    g_idx = torch.empty(96, dtype=torch.int32)
    g_idx[order] = torch.arange(96, dtype=torch.int32) // 32
    straight = quantize(x[:, order], grid, scheme)
    codes = quantize(x, grid, scheme, g_idx)
    assert torch.equal(codes[:, order], straight)
    assert torch.equal(dequantize(codes, grid, scheme, g_idx=g_idx)[:, order], dequantize(straight, grid, scheme))


def test_expand_cuts_short_groups_and_blocks() -> None:
    scale = torch.arange(6.0).reshape(2, 3)
    assert expand(scale, 5, PerGroup(2)).tolist() == [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert expand(scale, 5, PerBlock(2, 2), rows=3).tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]]
    assert expand(scale[:, :1], 5, PerChannel()).shape == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", INTEGERS[::5] + FLOATS, ids=lambda s: f"{s.format}-{s.granularity}-{s.symmetric}")
def test_fake_quantize_gives_the_stored_values(scheme: TensorScheme, dtype: torch.dtype) -> None:
    x = weight().to(dtype)
    grid = weight_grid(x, scheme)
    assert torch.equal(fake_quantize(x, grid, scheme), dequantize(quantize(x, grid, scheme), grid, scheme, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_straight_through_and_lsq(symmetric: bool) -> None:
    scheme = TensorScheme(INT4, PerChannel(), symmetric)
    x = torch.tensor([[0.3, -0.26, 0.9, 5.0, -7.0]], requires_grad=True)
    scale = torch.tensor([[0.1]], requires_grad=True)
    zero = None if symmetric else torch.tensor([[2.0]], requires_grad=True)
    fake_quantize(x, Grid(scale, zero), scheme).sum().backward()
    shift = 0.0 if symmetric else 2.0
    expected_x, expected_scale, expected_zero = [], 0.0, 0.0
    for value in x.detach()[0].tolist():
        scaled = value / 0.1 + shift
        inside = -8 <= scaled <= 7
        code = min(max(round(scaled), -8), 7)
        expected_x.append(float(inside))
        expected_scale += code - shift - (value / 0.1 if inside else 0.0)
        expected_zero += 0.0 if inside else -0.1
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad[0].tolist() == pytest.approx(expected_x)
    assert float(scale.grad) == pytest.approx(expected_scale, rel=1e-4)
    if zero is not None:
        assert float(zero.grad) == pytest.approx(expected_zero)  # type: ignore[arg-type]


def test_an_empty_activation_is_refused() -> None:
    scheme = Scheme.parse("W8A8").inputs
    assert scheme is not None
    with pytest.raises(AerogelError, match="empty"):
        dynamic_grid(torch.zeros(0, 8)[:, :0], scheme)
