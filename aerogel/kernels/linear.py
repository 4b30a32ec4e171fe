"""Fast twins of "quantize the input, dequantize the weight, F.linear", chosen by what was fastest when it was tried.

Which kernel wins depends on the processor, the threads, the shape and the number of rows; nothing here assumes it. At the first call with a
new combination all kernels that accept it are timed on that very call, and the winner is kept for the life of the process. Row counts
that round up to the same power of two share a choice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.kernels import int8, selection
from aerogel.kernels.affine import Affine
from aerogel.kernels.fp8 import Fp8
from aerogel.kernels.int4 import Int4
from aerogel.kernels.int8 import Int8
from aerogel.kernels.kernel import ACTIVATIONS, Kernel, Weight
from aerogel.kernels.reference import Reference, Sliced, reference

KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (Int4, Int8, Affine, Fp8, Sliced, Reference)}
_PROBE_ROWS = 64
"""Few-row kernels are tried with at most this many rows: beyond, a trial would cost seconds."""


def run(x: Tensor, weight: Weight, cache: dict[Any, Any], after: str = "") -> Tensor:
    """Return y (..., O) for the unquantized input x (..., I), in x's dtype; `after` names an activation that follows (ACTIVATIONS).

    `cache` belongs to the weight; packed copies live there and die with it. The reference runs where a gradient is needed. torch.compile
    can trace neither a measurement nor a packed copy: it gets the integer product where that is exact, else the reference.
    """
    exact = not x.numel() or (torch.is_grad_enabled() and x.requires_grad)
    if exact or torch.compiler.is_compiling():
        y = reference(x, weight) if exact or not int8.accepted(weight, x.device) else int8.traced(x, weight)
        return ACTIVATIONS[after](y) if after else y
    with torch.no_grad():
        x_TI = x.reshape(-1, weight.in_features)
        kernel = packed(choose(x_TI, weight, cache), weight, x_TI, cache)
        y_TO = kernel.followed(x_TI, after) if after else kernel(x_TI)
        return y_TO.view(*x.shape[:-1], weight.out_features)


def candidates(weight: Weight, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that can multiply inputs of `dtype` on `device` by `weight`; the reference is always the last."""
    return [name for name, kernel in KERNELS.items() if kernel.accepts(weight, device, dtype)]


def pack(name: str, weight: Weight, dtype: torch.dtype) -> Kernel:
    """Return the kernel called `name` with `weight` packed in it; raises AerogelError when it does not accept that weight."""
    device = weight.codes().device
    able = candidates(weight, device, dtype)
    if name not in able:
        able_names = ", ".join(able)
        raise AerogelError(f"kernel {name!r} cannot multiply {dtype} by {weight.scheme} weights on {device.type}; able: {able_names}")
    return KERNELS[name](weight, dtype)


def choose(x_TI: Tensor, weight: Weight, cache: dict[Any, Any]) -> str:
    """Return the name of the fastest kernel for these rows, measured at the first use of this combination."""
    able: list[str] | None = cache.get(("candidates", x_TI.device, x_TI.dtype))
    if able is None:
        able = cache[("candidates", x_TI.device, x_TI.dtype)] = candidates(weight, x_TI.device, x_TI.dtype)
    if len(able) == 1:
        return able[0]
    shape = (weight.in_features, weight.out_features, str(weight.scheme), weight.bias is None, weight.g_idx is None)
    key = ("linear", *shape, x_TI.device, x_TI.dtype, torch.get_num_threads(), (len(x_TI) - 1).bit_length())
    return selection.fastest(key, lambda: _implementations(able, x_TI, weight, cache), x_TI.device)


def _implementations(able: list[str], x_TI: Tensor, weight: Weight, cache: dict[Any, Any]) -> selection.Implementations:
    if len(x_TI) > _PROBE_ROWS:
        best = choose(x_TI[:_PROBE_ROWS], weight, cache)
        able = [name for name in able if name == best or not KERNELS[name].few_rows]
    return {name: partial(_run, name, weight, x_TI, cache) for name in able}


def _run(name: str, weight: Weight, x_TI: Tensor, cache: dict[Any, Any]) -> Tensor:
    y_TO: Tensor = packed(name, weight, x_TI, cache)(x_TI)
    return y_TO


def packed(name: str, weight: Weight, x_TI: Tensor, cache: dict[Any, Any]) -> Kernel:
    """Return the kernel called `name` for inputs like `x_TI`, packed at its first use and kept in `cache`."""
    key = (name, x_TI.device, x_TI.dtype)
    if key not in cache:
        cache[key] = KERNELS[name](weight, x_TI.dtype)
    kernel: Kernel = cache[key]
    return kernel
