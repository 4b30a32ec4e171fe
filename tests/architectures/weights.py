"""Random weights that hide no mistake: norms around their neutral value, biases that matter, matrices of unit gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

INPUTS_FIRST = ("Llama4TextExperts", "GptOssExperts")
"""Classes whose 3-D weights are (experts, in, out); those of other classes are (experts, out, in)."""
ROUTER_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Buffers that are added to the scores of experts."""


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a float32 model in evaluation mode without gradients, whose weights depend on the seed alone.

    Raises whatever `make` raises.
    """
    with torch.random.fork_rng(devices=[]), _uninitialized_as_nan():
        torch.manual_seed(seed)
        module = make().float().eval()
    fill(module, torch.Generator().manual_seed(seed))
    return module.requires_grad_(False)


@contextmanager
def _uninitialized_as_nan() -> Iterator[None]:
    """Fill memory that a class leaves as it finds it with NaN, so that no model depends on what was built before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Replace every matrix by a random one of unit gain, and add noise to every vector, in place.

    Vectors keep the value of their initialization: norms stay around 0 or 1, whichever is neutral, and decays of state-space layers in
    the range that their layers expect. Tables of sines stay as they are, because some classes compute them anew when they load.
    """
    tied = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    done: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in done and "Sinusoidal" not in type(layer).__name__:
                done.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = _values(layer, name, parameter.data, noise, id(parameter) in tied).to(parameter.dtype)
        for name, buffer in layer.named_buffers(recurse=False):
            if name in ROUTER_BIASES:
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def _values(layer: nn.Module, name: str, old: Tensor, noise: Tensor, is_head: bool) -> Tensor:
    if old.ndim <= 1:
        return old.nan_to_num() + (0.2 if name.endswith("weight") else 0.1) * noise
    if isinstance(layer, nn.Embedding) and not is_head:
        return noise
    return noise / math.sqrt(max(_fan_in(layer, old), 1))


def _fan_in(layer: nn.Module, weight: Tensor) -> int:
    """Return how many products each output sums up."""
    if isinstance(layer, Conv1D) or type(layer).__name__ in INPUTS_FIRST:
        return weight.shape[-2]
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return weight[0].numel()
    return weight.shape[-1]
