"""A quantized weight as kernels see it, made from random codes, and its product written out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerTensor, Scheme


@dataclass(eq=False)
class Plain:
    """Satisfies aerogel.kernels.kernel.Weight."""

    scheme: Scheme
    in_features: int
    out_features: int
    integers: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None

    def codes(self) -> Tensor:
        return self.integers

    def grid(self) -> Grid:
        return Grid(self.scale, self.zero)

    def input_grid(self) -> Grid | None:
        return None if self.input_scale is None else Grid(self.input_scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.exact().to(dtype)

    def exact(self) -> Tensor:
        """The weight_OI in float64."""
        span = self.scheme.group or self.in_features
        group_I = torch.arange(self.in_features) // span if self.g_idx is None else self.g_idx.long()
        zero = torch.zeros_like(self.scale) if self.zero is None else self.zero
        columns = [(self.integers[:, i].double() - zero[:, g].double()) * self.scale[:, g].double() for i, g in enumerate(group_I.tolist())]
        return torch.stack(columns, dim=1)

    def to(self, device: str) -> Plain:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Plain(**moved)


def plain(preset: str, out_features: int, in_features: int, bias: bool = False, act_order: bool = False, seed: int = 0) -> Plain:
    """Random codes over the whole range of the scheme, scales of very different size, and both ends of the range in the first row."""
    scheme = Scheme.parse(preset)
    make = torch.Generator().manual_seed(seed)
    fmt, groups = scheme.weights.format, 1 if scheme.group is None else -(-in_features // scheme.group)
    low, high = int(fmt.low), int(fmt.high)
    codes = torch.randint(low, high + 1, (out_features, in_features), generator=make).to(torch.int8)
    if fmt.kind == "int":
        codes[0, 0], codes[0, 1] = low, high
    scale = torch.rand(out_features, groups, generator=make) * torch.logspace(-3, 0, out_features)[:, None] + 1e-4
    zero = None if scheme.weights.symmetric else torch.randint(low, high + 1, (out_features, groups), generator=make).to(torch.int8)
    order = torch.randperm(in_features, generator=make)
    g_idx = (order // scheme.group).to(torch.int32) if act_order and scheme.group else None
    static = scheme.inputs is not None and isinstance(scheme.inputs.granularity, PerTensor)
    offsets = torch.randn(out_features, generator=make) if bias else None
    return Plain(scheme, in_features, out_features, codes, scale, zero, offsets, g_idx, torch.tensor(0.03) if static else None)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Rows of very different size, and (from two rows on) one of zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 1, rows)[:, None]
    if rows > 1:
        x[1] = 0
    return x.to(dtype)
