"""Convolutions whose weight is quantized: it is a matrix of outputs by channels x kernel, all else as in a quantized linear."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from aerogel.errors import AerogelError
from aerogel.kernels.conv2d import Window, run
from aerogel.layers import layout
from aerogel.layers.layout import Stored, blank, encode
from aerogel.layers.linear import QuantLinear
from aerogel.layers.replacement import Assigned
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerToken, Scheme, TensorScheme

Layer = nn.Linear | nn.Conv2d
"""Layers that can be quantized."""


class QuantConv2d(QuantLinear):
    """A convolution whose weight is integer codes and a grid; `in_features` is channels of a group x kernel height x width.

    Shapes: input (N, C, H, W) float, output (N, O, H, W) in the input's dtype.
    """

    effect: ClassVar[str] = "is a quantized convolution"

    window: Window

    @classmethod
    def of(cls, conv: nn.Conv2d, scheme: Scheme, tensors: dict[str, Tensor], bias: nn.Parameter | None) -> QuantConv2d:
        """Return one with the geometry of `conv`; raises AerogelError for padding that is not zeros."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise AerogelError(f"a convolution with padding {conv.padding!r} ({conv.padding_mode}) is not quantized; ignore it by name")
        made = cls(conv.weight[0].numel(), conv.out_channels, scheme, tensors, bias)
        made.compute_dtype = conv.weight.dtype
        kernel, stride, padding, dilation = (
            (int(down), int(right)) for down, right in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        )
        made.window = Window(kernel, stride, padding, dilation, conv.groups)
        return made

    def describe(self) -> dict[str, Any]:
        """Return nothing: the geometry is that of the model's own convolution."""
        return {}

    @classmethod
    def rebuild(cls, layer: nn.Module, told: Mapping[str, Any], assigned: Assigned | None) -> QuantConv2d:
        """Return the quantized twin of a convolution with nothing in it."""
        assert isinstance(layer, nn.Conv2d)
        assert assigned is not None
        weight = layer.weight
        tensors = blank(weight[0].numel(), len(weight), assigned.scheme, weight.dtype, weight.device)
        bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias), requires_grad=False)
        return cls.of(layer, assigned.scheme, tensors, bias)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.dequantized_cache is None:
            return run(x, self, {} if torch.compiler.is_compiling() else self.cache)
        if x.dtype not in self.dequantized_cache:
            self.dequantized_cache[x.dtype] = self.dequantized(x.dtype)
        kernel_OCHW = self.dequantized_cache[x.dtype].unflatten(1, (-1, *self.window.kernel))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        window = self.window
        return conv2d(self.quantized_input(x), kernel_OCHW, bias, window.stride, window.padding, window.dilation, window.groups)

    @property
    def weight(self) -> Tensor:
        """The float weight (O, C, H, W)."""
        return super().weight.unflatten(1, (-1, *self.window.kernel))

    def extra_repr(self) -> str:
        """Shape, geometry and scheme, for print(module)."""
        return f"{super().extra_repr()}, {self.window}"


def matrix(layer: Layer) -> Tensor:
    """The weight of a layer as a matrix weight_OI."""
    return layer.weight.flatten(1)


def quantized(
    layer: Layer,
    scheme: Scheme,
    codes_OI: Tensor,
    grid: Grid,
    g_idx: Tensor | None = None,
    input_grid: Grid | None = None,
    dtype: torch.dtype | None = None,
) -> QuantLinear:
    """Return the quantized twin of a linear or a convolution; the arguments are those of QuantLinear.from_codes."""
    if isinstance(layer, nn.Linear):
        return getattr(layer, "twin", QuantLinear).from_codes(layer, scheme, codes_OI, grid, g_idx, input_grid, dtype)
    tensors = encode(Stored(codes_OI, grid, g_idx, input_grid), scheme, dtype or layer.weight.dtype)
    return QuantConv2d.of(layer, scheme, tensors, cast(nn.Parameter | None, layer.bias))


def with_inputs(layer: QuantLinear, inputs: TensorScheme, grid: Grid, dtype: torch.dtype | None = None) -> QuantLinear:
    """Return the same weights with static inputs on a stored grid; `dtype` is that of stored scales, by default the one they have."""
    stored, scheme = layer.stored(), Scheme.of(layer.scheme.weights, inputs)
    kept = layer.get_buffer("weight_scale").dtype
    made = type(layer)(
        layer.in_features,
        layer.out_features,
        scheme,
        encode(stored._replace(input_grid=grid), scheme, dtype or kept),
        cast(nn.Parameter | None, layer.bias),
    )
    made.timestep_index = layer.timestep_index
    if isinstance(layer, QuantConv2d) and isinstance(made, QuantConv2d):
        made.window = layer.window
    return made


def refuse(layer: Layer, scheme: Scheme) -> str | None:
    """Return why a layer cannot be stored in a scheme, or None when it can."""
    if isinstance(layer, nn.Conv2d) and scheme.inputs is not None and isinstance(scheme.inputs.granularity, PerToken):
        return "a convolution reads no tokens; leave it out, or give it float inputs and put ranges after it"
    return layout.refuse(scheme, *size(layer))


def is_plain(layer: nn.Module) -> bool:
    """Return True for a layer that multiplies by its weight, adds its bias and does nothing else: then a quantized one can take its place.

    Classes derived from nn.Linear are tried out on a small weight: a router that gives scores and indices, or a layer that rounds its
    input, answers otherwise.
    """
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # attention of torch reads its weight and never calls it
        return False
    return type(layer) in (nn.Linear, nn.Conv2d) or (isinstance(layer, nn.Linear) and _multiplies(type(layer), layer))


@torch.no_grad()
def _multiplies(cls: type[nn.Linear], layer: nn.Linear) -> bool:
    if cls.forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 8), (5, 8), (5,)))
    small = copy.copy(layer)
    small.__dict__ |= {"_parameters": {"weight": weight, "bias": None if layer.bias is None else bias}}
    try:
        return torch.equal(cls.forward(small, x), linear(x, weight, None if layer.bias is None else bias))
    except Exception:  # noqa: BLE001  code that looks at more than weight and bias
        return False


def size(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a layer's matrix, float or quantized."""
    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel(), layer.out_channels
    return layer.in_features, layer.out_features
