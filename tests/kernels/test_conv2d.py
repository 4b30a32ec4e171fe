"""The convolution of codes in oneDNN against a literal sum in float64, and the choice between it and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.kernels import conv2d
from aerogel.layers.conv import QuantConv2d, matrix, quantized, size
from aerogel.layers.linear import cache_dequantized, stored_grid
from aerogel.numerics.quantize import dequantize, fake_quantize, grid_from_range, quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.kernels.exact_sums import needs_exact_sums

SCHEMES = ["W8A8_CHANNEL_STATIC", "W8A8_CHANNEL_AFFINE", "W8A8_CHANNEL_ASYM_AFFINE", "W4A8_CHANNEL_ASYM_AFFINE", "W3A8_CHANNEL_AFFINE"]
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
]


def made(scheme_name: str, **geometry: Any) -> tuple[QuantConv2d, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 20, **geometry)
    scheme = Scheme.parse(scheme_name)
    grid = stored_grid(weight_grid(matrix(conv), scheme.weights), torch.float32)
    assert scheme.inputs is not None
    inputs = grid_from_range(torch.tensor(-1.0), torch.tensor(3.0), scheme.inputs)
    twin = quantized(conv, scheme, quantize(matrix(conv), grid, scheme.weights), grid, None, inputs)
    assert isinstance(twin, QuantConv2d)
    return twin, torch.randn(2, 12, 9, 7) + 0.5


def literal(twin: QuantConv2d, x: Tensor) -> Tensor:
    """A sum over the window, place by place, of dequantized numbers in float64."""
    inputs, grid = twin.scheme.inputs, twin.input_grid()
    assert inputs is not None
    assert grid is not None
    values = fake_quantize(x.float(), grid, inputs).double()
    kernel = dequantize(twin.codes(), twin.grid(), twin.scheme.weights).double().view(20, 12, *twin.window.kernel)
    (down, right), (step_down, step_right) = twin.window.padding, twin.window.stride
    padded = nn.functional.pad(values, (right, right, down, down))
    (tall, wide), (apart_down, apart_right) = twin.window.kernel, twin.window.dilation
    rows = (padded.shape[2] - apart_down * (tall - 1) - 1) // step_down + 1
    columns = (padded.shape[3] - apart_right * (wide - 1) - 1) // step_right + 1
    y = torch.zeros(len(x), 20, rows, columns, dtype=torch.float64)
    for i in range(tall):
        for j in range(wide):
            top, left = i * apart_down, j * apart_right
            seen = padded[:, :, top : top + step_down * rows : step_down, left : left + step_right * columns : step_right]
            y += torch.einsum("nchw,oc->nohw", seen, kernel[:, :, i, j])
    return y if twin.bias is None else y + twin.bias.double()[:, None, None]


@needs_exact_sums
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_give_the_literal_sum(scheme: str, geometry: dict[str, Any]) -> None:
    twin, x = made(scheme, **geometry)
    wanted = literal(twin, x)
    for y in (conv2d.by_integers(x, twin, {}), conv2d.reference(x, twin), twin(x)):
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    with cache_dequantized(twin):
        torch.testing.assert_close(twin(x).double(), wanted, rtol=1e-5, atol=1e-5)


@needs_exact_sums
def test_extreme_codes_do_not_saturate() -> None:
    twin, _ = made("W8A8_CHANNEL_ASYM_AFFINE", kernel_size=3, padding=1)
    twin.weight[:] = 127
    twin.weight[::2] = -128
    x = torch.full((1, 12, 9, 7), 3.0)
    torch.testing.assert_close(conv2d.by_integers(x, twin, {}).double(), literal(twin, x), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_rounded_once() -> None:
    twin, x = made("W4A8_CHANNEL_ASYM_AFFINE", kernel_size=3, padding=1)
    x = x.bfloat16()
    y = conv2d.by_integers(x, twin, {})
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), literal(twin, x), rtol=2**-7, atol=2**-7)


def test_layouts_of_memory_do_not_matter() -> None:
    twin, x = made("W8A8_CHANNEL_AFFINE", kernel_size=3, padding=1)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv2d.by_integers(last, twin, {}), conv2d.by_integers(x, twin, {}))


def test_one_packed_weight_serves_images_of_all_sizes() -> None:
    twin, x = made("W4A8_CHANNEL_ASYM_AFFINE", kernel_size=3, padding=1)
    cache: dict[Any, Any] = {}
    for image in (x, torch.randn(1, 12, 33, 20), torch.randn(5, 12, 4, 4), x):
        torch.testing.assert_close(conv2d.by_integers(image, twin, cache).double(), literal(twin, image), rtol=1e-5, atol=1e-5)
    assert len(cache) == 1


def test_gradients_pass_the_reference() -> None:
    twin, x = made("W8A8_CHANNEL_AFFINE", kernel_size=3, padding=1)
    x.requires_grad_(True)
    twin(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_groups_are_left_to_the_reference() -> None:
    conv = nn.Conv2d(12, 12, 3, groups=12)
    scheme = Scheme.parse("W8A8_CHANNEL_AFFINE")
    assert scheme.inputs is not None
    grid = weight_grid(matrix(conv), scheme.weights)
    inputs = grid_from_range(torch.tensor(-4.0), torch.tensor(4.0), scheme.inputs)
    twin = quantized(conv, scheme, quantize(matrix(conv), grid, scheme.weights), grid, None, inputs)
    x = torch.randn(1, 12, 5, 5)
    assert isinstance(twin, QuantConv2d)
    assert size(conv) == size(twin) == (9, 12)
    assert not conv2d.takes(twin, x)
    torch.testing.assert_close(twin(x), conv(x), rtol=0, atol=0.1)
