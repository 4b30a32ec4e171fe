"""Fast twins of "quantize the input, dequantize the weight, conv2d", chosen by what was fastest when it was tried.

O outputs, I = channels of a group x kernel height x kernel width; images are NCHW.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from aerogel.kernels import selection
from aerogel.kernels.affine import accepted, bias_of, quantized, signed, without_zeros
from aerogel.kernels.kernel import Weight
from aerogel.kernels.reference import quantized_input


class Window(NamedTuple):
    """Geometry of a convolution."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Convolved(Weight, Protocol):
    """A quantized convolution as kernels see it."""

    window: Window


def run(x_NCHW: Tensor, weight: Convolved, cache: dict[Any, Any]) -> Tensor:
    """Return y_NOHW for the unquantized input, in its dtype, by integers where that is possible and was faster when it was tried."""
    differentiable = torch.is_grad_enabled() and x_NCHW.requires_grad
    if differentiable or not takes(weight, x_NCHW):
        return reference(x_NCHW, weight)
    ways = {"integers": partial(by_integers, x_NCHW, weight, cache), "reference": partial(reference, x_NCHW, weight)}
    key = ("conv2d", x_NCHW.shape, x_NCHW.dtype, weight.out_features, weight.window, str(weight.scheme), torch.get_num_threads())
    with torch.no_grad():
        return ways[selection.fastest(key, lambda: ways, x_NCHW.device)]()


def takes(weight: Convolved, x_NCHW: Tensor) -> bool:
    """Return True if integer arithmetic gives the reference's result here."""
    return weight.window.groups == 1 and x_NCHW.numel() > 0 and accepted(weight, x_NCHW.device, x_NCHW.dtype)


def reference(x_NCHW: Tensor, weight: Convolved) -> Tensor:
    """Convolve floats with the arithmetic of numerics in x's dtype; differentiable in x."""
    window, bias = weight.window, None if weight.bias is None else weight.bias.to(x_NCHW.dtype)
    kernel_OCHW = weight.dequantized(x_NCHW.dtype).unflatten(1, (-1, *window.kernel))
    return conv2d(quantized_input(x_NCHW, weight), kernel_OCHW, bias, window.stride, window.padding, window.dilation, window.groups)


def by_integers(x_NCHW: Tensor, weight: Convolved, cache: dict[Any, Any]) -> Tensor:
    """Convolve integer codes in oneDNN: sums are exact, so only the last two roundings differ from the reference."""
    window = weight.window
    moves = (list(window.stride), list(window.padding), list(window.dilation), window.groups)
    codes, scale, zero = quantized(x_NCHW, weight)
    if "conv2d" not in cache:
        rows = signed(weight.codes().detach(), weight.grid())
        kernel_OCHW = rows.codes_OI.unflatten(1, (-1, *window.kernel)).contiguous()
        cache["conv2d"] = rows, torch.ops.onednn.qconv_prepack(kernel_OCHW, rows.scale_O, scale, zero, *moves, list(x_NCHW.shape))
    rows, packed = cache["conv2d"]
    kind = x_NCHW.dtype if rows.zero_O is None else torch.float32
    none = torch.zeros(len(rows.scale_O), dtype=torch.int32)
    rest: tuple[Any, ...] = (packed, rows.scale_O, none, bias_of(weight, rows), *moves, 1.0, 0, kind, "none", [], "")
    return without_zeros(torch.ops.onednn.qconv2d_pointwise(codes, scale, zero, *rest), rows, 1).to(x_NCHW.dtype)
