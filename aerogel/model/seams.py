"""Seams: layers that read concatenated channels, as in the skip connections of a UNet, and their form with one part a source."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from aerogel.layers.conv import Layer
from aerogel.model.calls import Call
from aerogel.model.network import Network

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def seams(network: Network, call: Call) -> dict[str, tuple[int, ...]]:
    """Return the float layers that read images or tokens concatenated along their channels, from one forward.

    They come by full name, with the widths of their parts.
    """
    found: dict[str, tuple[int, ...]] = {}
    joined = _Joined()

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            dimension, parts = joined.made.get(x, (0, ()))
            # Vectors do not count: a sinusoid is a concatenation too.
            if len(parts) > 1 and x.ndim > 2 and dimension == (1 if isinstance(layer, nn.Conv2d) else x.ndim - 1):
                found[name] = parts

        return hook

    with ExitStack() as stack:
        for name, module in network.module.named_modules():
            if isinstance(module, Layer):
                stack.callback(module.register_forward_pre_hook(look(name)).remove)
        with joined:
            network.run(call)
    return found


class _Joined(TorchFunctionMode):
    """Remembers of which widths, and along which dimension, tensors were concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONCATENATIONS:
            tensors = args[0] if args else kwargs["tensors"]
            dimension = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % result.ndim
            self.made[result] = (dimension, tuple(tensor.shape[dimension] for tensor in tensors))
        return result
