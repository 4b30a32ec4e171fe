"""Placeholder weights: a network runs without its weights, on numbers that stand for them, and is what it was afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aerogel.layers.conv import QuantConv2d
from aerogel.layers.linear import QuantLinear
from aerogel.model.hooks import patch_forward, uncompiled
from aerogel.model.structure.observer import Observer, Read

Fill = Callable[[str, Tensor], Tensor]
"""(full name, tensor) -> what stands for it."""
Seen = Callable[[str, Tensor, Tensor], Tensor]
"""(layer, what it reads, random numbers) -> what it gives."""


@contextmanager
def replaced_tensors(module: nn.Module, fill: Fill, untie: bool = False) -> Iterator[None]:
    """Put `fill(name, tensor)` in the place of every parameter and buffer for a while; what was shared stays shared, unless `untie`.

    Compiled modules run as they are written: they are watched, and nothing is to be compiled for weights that nobody has.
    """
    made: dict[int, Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    with ExitStack() as stack:
        stack.callback(_put_back, before)
        stack.enter_context(uncompiled(module))
        for name, part in module.named_modules():
            for table in (part._parameters, part._buffers):
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    if untie or id(tensor) not in made:
                        made[id(tensor)] = fill(f"{name}.{key}" if name else key, tensor)
                    before.append((table, key, tensor))
                    new = made[id(tensor)]
                    if isinstance(tensor, nn.Parameter):
                        new = parameters.setdefault(id(new), nn.Parameter(new, requires_grad=False))
                    table[key] = new
        yield


def _put_back(before: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for table, key, tensor in before:
        table[key] = tensor


@cache
def _numbers() -> Tensor:
    """Random numbers, drawn once: copies are made ten times as fast. A prime number of them, so that rows are unlike."""
    return torch.randn(1_000_003, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@contextmanager
def placeholder_weights(module: nn.Module, seen: Seen = lambda name, x, y: y) -> Iterator[None]:
    """Let a network run on the CPU without its weights: products with them give random numbers of the right shape.

    A weight takes no memory: all of it is one number. Vectors have random values near one, buffers keep the values that they have,
    in float32 where they have 16 bits.
    `seen` may give something else for a product.
    """
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            values = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
            return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.ndim > 1:
            return torch.full((1,), 0.5).expand(tensor.shape)
        return 1 + 0.1 * torch.randn(tensor.shape, generator=generator)

    def random(shape: torch.Size) -> Tensor:
        numbers, count = _numbers(), shape.numel()
        start = int(torch.randint(len(numbers), (1,), generator=generator))
        if start + count > len(numbers):
            numbers = numbers.repeat((start + count) // len(numbers) + 1)
        return numbers[start : start + count].clone().view(shape)

    def answer(read: Read) -> Tensor:
        return seen(read.name.removesuffix(".weight"), read.x, random(read.shape()))

    with ExitStack() as stack:
        stack.enter_context(replaced_tensors(module, fill))
        quantized = {name: part for name, part in module.named_modules() if isinstance(part, QuantLinear)}
        stack.enter_context(patch_forward({part: _answer(name, part, random, seen) for name, part in quantized.items()}))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the model's code, about inputs that are only an example
        stack.enter_context(Observer(dict(module.named_parameters()), answer=answer, double=False))
        yield


def _answer(name: str, layer: QuantLinear, random: Callable[[torch.Size], Tensor], seen: Seen) -> Callable[..., Tensor]:
    """Random numbers in the shape of a quantized layer's output."""

    def forward(x: Tensor) -> Tensor:
        return seen(name, x, random(_shape(layer, x)))

    return forward


def _shape(layer: QuantLinear, x: Tensor) -> torch.Size:
    if not isinstance(layer, QuantConv2d):
        return torch.Size((*x.shape[:-1], layer.out_features))
    window = layer.window
    channels = layer.in_features // math.prod(window.kernel)
    weight = torch.empty((layer.out_features, channels, *window.kernel), device="meta")
    geometry = (window.stride, window.padding, window.dilation, window.groups)
    return functional.conv2d(x.to("meta"), weight, None, *geometry).shape
