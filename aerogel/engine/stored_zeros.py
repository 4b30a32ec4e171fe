"""The share of zeros of pruned layers, counted as their tensors are saved: rounding to the stored dtype or to a grid adds some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from aerogel.layers.layout import decode
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network
from aerogel.numerics.quantize import dequantize
from aerogel.numerics.sparsity import zero_share


def counted(network: Network, tensors: Iterable[tuple[str, Tensor]], zeros: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    """Pass on (full name, tensor) pairs, and add the share of zeros of each pruned layer to `zeros`, by name.

    The tensors of one quantized layer are held until all of them are there.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        yield name, tensor
        layer, _, part = name.rpartition(".")
        if layer not in network.pruned:
            continue
        module = network.module.get_submodule(layer)
        if not isinstance(module, QuantLinear):
            if part == "weight":
                zeros[layer] = zero_share(tensor.to(network.stored_dtype or tensor.dtype))
            continue
        found = waiting.setdefault(layer, {})
        found[part] = tensor
        if {key for key, buffer in module._buffers.items() if buffer is not None} <= found.keys():
            codes_OI, grid, g_idx, _ = decode(waiting.pop(layer), module.scheme, module.in_features)
            zeros[layer] = zero_share(dequantize(codes_OI, grid, module.scheme.weights, g_idx=g_idx))
