"""Storage of tensors from one step to a later one, as they are or in float8 with a scale a token, and checks that they stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.errors import AerogelError
from aerogel.model.calls import tensors_in
from aerogel.numerics.formats import format_named
from aerogel.numerics.quantize import Grid, dequantize, dynamic_grid, quantize
from aerogel.numerics.scheme import PerToken, TensorScheme

CacheDtype = Literal["compute", "float8"]
_FLOAT8 = TensorScheme(format_named("fp8_e4m3"), PerToken(), dynamic=True)


class Float8(NamedTuple):
    """A tensor in float8_e4m3fn."""

    codes: Tensor
    scale: Tensor
    """float32, of the tensor's shape with a last dimension of 1: largest magnitude of the token / 448."""
    dtype: torch.dtype
    """Dtype as which it is read."""


@dataclass(frozen=True)
class CacheFormat:
    """Storage of a nest of tensors: how it is written and read."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def cache_format(name: str) -> CacheFormat:
    """The store of a name; raises AerogelError for one that is none."""
    if name not in _STORES:
        raise AerogelError(f"cache_dtype is {name!r}, expected one of {', '.join(_STORES)}")
    return _STORES[name]


def versions(tree: Any) -> tuple[int, ...]:
    """Return how often each tensor of a nest was changed in place so far; tensors of inference mode do not count."""
    if tree is None:
        return ()
    tensors = [tree] if isinstance(tree, Tensor) else tensors_in(tree)  # asked for often, and mostly of one tensor
    return tuple(tensor._version for tensor in tensors if not tensor.is_inference())


def _as_it_is(tree: Any) -> Any:
    return tree


def _packed(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: _to_float8(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _unpacked(tree: Any) -> Any:
    return pytree.tree_map(_from_float8, tree, is_leaf=lambda leaf: isinstance(leaf, Float8))


def _to_float8(x: Tensor) -> Tensor | Float8:
    if not x.is_floating_point() or x.ndim == 0 or x.numel() == 0:
        return x
    x = x.detach()
    grid = dynamic_grid(x, _FLOAT8)
    return Float8(quantize(x, grid, _FLOAT8), grid.scale, x.dtype)


def _from_float8(leaf: Any) -> Any:
    return dequantize(leaf.codes, Grid(leaf.scale), _FLOAT8, leaf.dtype) if isinstance(leaf, Float8) else leaf


_STORES = {"compute": CacheFormat(_as_it_is, _as_it_is), "float8": CacheFormat(_packed, _unpacked)}
