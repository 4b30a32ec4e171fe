"""Quantized linear layers: their buffers are what is saved, tensor for tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from aerogel.errors import AerogelError
from aerogel.kernels.kernel import ACTIVATIONS
from aerogel.kernels.linear import run
from aerogel.layers.layout import Stored, blank, decode, decode_input, encode, refuse
from aerogel.layers.replacement import Assigned, Replacement
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.numerics.quantize import Grid, dequantize, dynamic_grid, fake_quantize
from aerogel.numerics.scheme import PerStep, Scheme


def stored_grid(grid: Grid, dtype: torch.dtype) -> Grid:
    """Return the grid as it comes back from disk when scales are stored in `dtype`; make integer codes with this one, not with the first.

    A scale that would vanish or overflow in `dtype` takes the nearest one that does not. Block scales that have a format of
    their own (nv) are not touched.
    """
    if grid.outer is not None:
        return grid
    info = torch.finfo(dtype)
    return grid._replace(scale=grid.scale.float().clamp(info.tiny * info.eps, info.max).to(dtype).float())


class QuantLinear(Replacement):
    """A linear whose weight is integer codes and a grid; its buffers are the compressed-tensors layout (see layout.py).

    Shapes: input (..., in_features) float, output (..., out_features) in the input's dtype.
    """

    effect: ClassVar[str] = "has one input scale for each denoising step"
    in_groups: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, tensors: dict[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self._buffers.update(tensors)  # register_buffer would not take the name of the property `weight`
        self.register_parameter("bias", bias)
        self.bias: nn.Parameter | None
        self.timestep_index: TimestepIndex | None = None
        self._packed = WeakTensorKeyDictionary()
        self.dequantized_cache: dict[torch.dtype, Tensor] | None = None
        self.compute_dtype = torch.float32
        """Type of the layer that it replaced."""

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        codes_OI: Tensor,
        grid: Grid,
        g_idx: Tensor | None = None,
        input_grid: Grid | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """Return the quantized twin of `linear`, whose shape and bias it takes over.

        `grid` must be a stored grid of `dtype`, the dtype of stored scales (the linear's own when None). `g_idx` (I) names the
        group of each column where groups follow activation order. `input_grid` is needed when the scheme's inputs are static.
        """
        tensors = encode(Stored(codes_OI, grid, g_idx, input_grid), scheme, dtype or linear.weight.dtype)
        made = cls(linear.in_features, linear.out_features, scheme, tensors, linear.bias)
        made.compute_dtype = linear.weight.dtype
        return made

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        act_order: bool = False,
    ) -> QuantLinear:
        """Return one with nothing in it, for load_state_dict; `dtype` is that of scales and bias."""
        vector = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        return cls(in_features, out_features, scheme, blank(in_features, out_features, scheme, dtype, device, act_order), vector)

    @property
    def assigned(self) -> Assigned:
        """Scheme of the weight."""
        return Assigned(self.scheme, self.g_idx is not None)

    def describe(self) -> dict[str, Any] | None:
        """Return None, save where there is one scale a step, which compressed-tensors cannot express."""
        inputs = self.scheme.inputs
        return {} if inputs is not None and isinstance(inputs.granularity, PerStep) else None

    @classmethod
    def rebuild(cls, layer: nn.Module, told: Mapping[str, Any], assigned: Assigned | None) -> QuantLinear:
        """Return the quantized twin of a linear with nothing in it."""
        assert isinstance(layer, nn.Linear)
        assert assigned is not None
        weight, shape = layer.weight, (layer.in_features, layer.out_features)
        tensors = blank(*shape, assigned.scheme, weight.dtype, weight.device, assigned.act_order)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        made = cls(*shape, assigned.scheme, tensors, layer.bias)  # which may be another layer's too
        made.compute_dtype = weight.dtype
        return made

    def refuse(self) -> str | None:
        """Return why the format cannot hold a layer of this shape, or None when it can."""
        return refuse(self.scheme, self.in_features, self.out_features)

    @property
    def cache(self) -> dict[Any, Any]:
        """Weights that kernels have packed for themselves: never saved, and gone as soon as the tensor it was packed from is."""
        kept: dict[Any, Any] = self._packed.setdefault(next(iter(self._tensors().values())), {})
        return kept

    @property
    def weight(self) -> Tensor:
        """The float weight_OI, made anew for whoever reads it: code of models that multiplies by itself, or asks for the type."""
        dtype = self.compute_dtype
        if next(iter(self._tensors().values())).is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        if self.dequantized_cache is not None and dtype not in self.dequantized_cache:
            self.dequantized_cache[dtype] = self.dequantized(dtype)
        return self.dequantized(dtype) if self.dequantized_cache is None else self.dequantized_cache[dtype]

    @property
    def g_idx(self) -> Tensor | None:
        """The group of each column where groups follow activation order, else None."""
        return self._buffers.get("weight_g_idx")

    @property
    def outer(self) -> Tensor | None:
        """The outer scale of the weight, a scalar; None where its format has none."""
        outer = self._buffers.get("weight_global_scale")
        return None if outer is None else outer.reshape(())

    def stored(self) -> Stored:
        """Unpack everything at once: integer codes, grid, g_idx and the grid of static inputs."""
        return decode(self._tensors(), self.scheme, self.in_features)

    def codes(self) -> Tensor:
        """Unpack the codes_OI, in the storage dtype of the format."""
        return self.stored().codes

    def grid(self) -> Grid:
        """Unpack the grid of the weight."""
        return self.stored().grid

    def input_grid(self) -> Grid | None:
        """The grid of static inputs, or None when inputs are float or measured at run time; of the step at hand where it has one a step.

        Raises AerogelError outside of a denoiser's forward, and for a batch of several steps.
        """
        grid, inputs = decode_input(self._tensors(), self.scheme), self.scheme.inputs
        if grid is None or inputs is None or not isinstance(inputs.granularity, PerStep):
            return grid
        rows = set(self.timestep_index.rows) if self.timestep_index is not None else set()
        if len(rows) != 1:
            raise AerogelError(
                f"a layer with one scale a step needs a batch of one step and its denoiser's time step, got steps {sorted(rows)}"
            )
        (row,) = rows
        return Grid(grid.scale[row], None if grid.zero is None else grid.zero[row])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the float weight_OI that the integer codes stand for, computed in float32 and rounded once."""
        codes, grid, g_idx, _ = self.stored()
        return dequantize(codes, grid, self.scheme.weights, dtype, g_idx)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Round `x` (..., I) to the grid of the scheme's inputs; `x` itself when inputs stay float."""
        inputs = self.scheme.inputs
        if inputs is None or x.numel() == 0:
            return x
        return fake_quantize(x, self.input_grid() or dynamic_grid(x, inputs), inputs)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - code of models may give it by the name that nn.Linear has
        """Quantize the input if the scheme says so, and multiply; samples of different steps one by one, each with its own scale."""
        inputs, index = self.scheme.inputs, self.timestep_index
        if index is None or inputs is None or not isinstance(inputs.granularity, PerStep) or len(set(index.rows)) == 1:
            return self._multiply(input)
        parts = []
        for number, row in enumerate(index.rows):
            with index.at((row,)):
                parts.append(self._multiply(input[number : number + 1]))
        return torch.cat(parts)

    def followed(self, x: Tensor, after: str) -> Tensor:
        """Forward and the activation `after` it (see ACTIVATIONS), by one kernel where one does both, unless somebody looks between."""
        watched = self._forward_pre_hooks or self._forward_hooks or "forward" in vars(self)
        if watched or self.dequantized_cache is not None or (self.timestep_index is not None and len(set(self.timestep_index.rows)) > 1):
            return ACTIVATIONS[after](self(x))
        return run(x, self, {} if torch.compiler.is_compiling() else self.cache, after)

    def _multiply(self, x: Tensor) -> Tensor:
        """By the fastest kernel, or by the held float weight."""
        if self.dequantized_cache is None:
            return run(x, self, {} if torch.compiler.is_compiling() else self.cache)
        if x.dtype not in self.dequantized_cache:
            self.dequantized_cache[x.dtype] = self.dequantized(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(self.quantized_input(x), self.dequantized_cache[x.dtype], bias)

    def extra_repr(self) -> str:
        """Shape and scheme, for print(module)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, scheme={self.scheme}"

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        # Casting a model must not round scales again or turn fp8 codes into floats: only the device may change.
        before = self._tensors()
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name, tensor in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*args, **kwargs)


@contextmanager
def cache_dequantized(module: nn.Module) -> Iterator[None]:
    """Keep the float weights of all quantized linear layers in `module` from their first use to the end of the context.

    For passes that run the same block over many calls: exact in float arithmetic, differentiable in the input, no kernel is measured.
    Costs the float weights' memory while it lasts.
    """
    linears = [part for part in module.modules() if isinstance(part, QuantLinear) and part.dequantized_cache is None]
    for linear in linears:
        linear.dequantized_cache = {}
    try:
        yield
    finally:
        for linear in linears:
            linear.dequantized_cache = None


def timestep_index_of(module: nn.Module) -> TimestepIndex | None:
    """Return the timestep index that layers of a denoiser read, or None when no layer has one scale a step."""
    layers = (part for part in module.modules() if isinstance(part, QuantLinear))
    return next((layer.timestep_index for layer in layers if layer.timestep_index is not None), None)


def set_timestep_index(module: nn.Module, index: TimestepIndex, once_per_step: Iterable[str]) -> None:
    """Let a denoiser's layers with one scale a step read this index from now on; see TimestepIndex.track for `once_per_step`."""
    for part in module.modules():
        if isinstance(part, QuantLinear) and part.scheme.inputs is not None and isinstance(part.scheme.inputs.granularity, PerStep):
            part.timestep_index = index
    index.track(module, once_per_step)
