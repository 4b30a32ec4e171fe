"""Random weights that hide no mistake: norms around one, biases that matter, matrices of unit gain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EXPERTS_IN_OUT = ("Llama4", "GptOss", "Dbrx")


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a float32 model in evaluation mode whose weights depend on the seed alone, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().float().eval()
    fill(module, torch.Generator().manual_seed(seed))
    return module.requires_grad_(False)


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Replace every matrix by a random one of unit gain and add noise to every vector, in place."""
    heads = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    done: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in done:
                done.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = _values(layer, name, parameter.data, noise, tied=id(parameter) in heads).to(parameter.dtype)


def _values(layer: nn.Module, name: str, old: Tensor, noise: Tensor, tied: bool) -> Tensor:
    if old.ndim <= 1:
        return old + 0.15 * noise  # norms stay around their neutral value, be it one or zero
    if isinstance(layer, nn.Embedding) and not tied:
        return noise
    return noise / math.sqrt(max(_fan_in(layer, old), 1))


def _fan_in(layer: nn.Module, weight: Tensor) -> int:
    if isinstance(layer, Conv1D):
        return weight.shape[0]
    if isinstance(layer, nn.Linear | nn.Embedding) or not type(layer).__name__.startswith(("Conv", "Causal")):
        return weight.shape[-1]
    return weight[0].numel()
