"""Estimates of the plan: bytes on disk and in memory, and seconds by stage, from shapes and what methods say that they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from aerogel.engine.progress import StageName
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import TextMeasure
from aerogel.kernels import synchronized_clock
from aerogel.layers.conv import Layer, size
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.layers.slots import Slot, slots
from aerogel.methods.base import BlockMethod, CalibrationSize, Method, RuntimePolicy
from aerogel.model.network import Network
from aerogel.model.placement import HOST, host_memory
from aerogel.model.processes import ALONE, Processes
from aerogel.recipe import Recipe
from aerogel.report import phrases
from aerogel.runtime.expert_skipping.routing import shape_of

_BYTES_A_SECOND = 300e6
# Pages of the files being read count as memory until they are closed.
_MAPPED = 32 << 20
# Matrices of the size of a Hessian that are alive while one is factored, and of the size of a weight while it is rounded.
_FACTORING = 5
_ROUNDING = 6
# Sides of the matrices that are multiplied to see how fast a device is: large enough to keep it busy.
_CPU_PRODUCT, _ACCELERATOR_PRODUCT = 768, 4096
_TIMED_SECONDS = 0.05
# Forwards that an optimiser step is worth: one, and twice that for its gradients.
_FITTING = 3
# Perplexity and agreement both read both networks, in windows that overlap.
_EVALUATED_TOKENS = 4 * TextMeasure.tokens * TextMeasure.length // TextMeasure.stride


def stored_dtype(network: Network, name: str, tensor: torch.Tensor) -> torch.dtype:
    """Return the type that a tensor has on disk."""
    if network.checkpoint is not None and name in network.checkpoint:
        return network.checkpoint.dtype(name)
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return network.stored_dtype if wide and network.stored_dtype else tensor.dtype


def _unique_slots(network: Network) -> list[Slot]:
    """Places of stored tensors, one for each tensor however many modules share it."""
    return list({id(slot.tensor): slot for slot in reversed(list(slots(network.module)))}.values())


@dataclass(frozen=True)
class Sizes:
    """The weights of a model in numbers."""

    parameters: int
    source: int
    untouched: int
    """Bytes on disk of the tensors that the recipe leaves."""
    active: float
    """Parameters that a token passes: of an MoE model's experts those that it goes to."""

    @classmethod
    def of(cls, network: Network, touched: set[str], shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """Count a model's weights, with the names of the layers that a recipe quantizes and the shapes that parameters have afterwards."""
        stored = [(slot, slot.tensor.numel() * stored_dtype(network, slot.name, slot.tensor).itemsize) for slot in _unique_slots(network)]
        left = sum(
            size // max(slot.tensor.numel(), 1) * math.prod(shapes.get(slot.name, slot.tensor.shape))
            for slot, size in stored
            if slot.name.rpartition(".")[0] not in touched
        )
        source = network.checkpoint.bytes() if network.checkpoint is not None else sum(size for _, size in stored)
        parameters = sum(slot.tensor.numel() for slot, _ in stored if isinstance(slot.tensor, nn.Parameter))
        parameters += _coded_weights(network)
        return cls(parameters, source, left, parameters - _resting(network))


def _resting(network: Network) -> float:
    """Weights of experts that an average token does not go to."""
    found = [part for part in network.module.modules() if isinstance(part, ExpertList)]
    weights = sum(inputs * outputs for part in found for inputs, outputs in (size(one) for one in part.modules() if isinstance(one, Layer)))
    with suppress(AerogelError):  # a router that does not say how many experts a token goes to: all count as active
        return weights * (1 - shape_of(network).top_k / shape_of(network).experts) if found else 0.0
    return 0.0


def _coded_weights(network: Network) -> int:
    return sum(part.in_features * part.out_features for part in network.module.modules() if isinstance(part, QuantLinear))


class Memory(NamedTuple):
    """Bytes that a run takes at its peak, over the interpreter's own: estimates."""

    host: int
    device: int
    """On the accelerator; 0 where the CPU computes."""


def peak_memory(network: Network, recipe: Recipe, read: CalibrationSize, processes: int = 1) -> Memory:
    """Add up what stays resident, the block in hand twice, and what calibrating it or rounding its largest weight takes.

    Steps that run the whole network hold all of it on the device, or one part of its blocks where so many processes share them out.
    """
    blocks = network.blocks()
    sizes = {name: sum(p.numel() * p.element_size() for p in module.parameters()) for name, module in blocks.items()}
    weights, held = sum(slot.tensor.nbytes for slot in _unique_slots(network)), sum(sizes.values())
    in_hand = 2 * max(sizes.values(), default=0)
    mapped = 0 if network.checkpoint is None else min(_MAPPED, network.checkpoint.bytes())
    working = _working(network, recipe, read)
    sides = 2 if needs_teacher(recipe) else 1
    whole = [step.method for step in recipe.steps if not isinstance(step.method, BlockMethod)]
    of_blocks = partial(_held_of_blocks, held, processes)
    if not network.placement.on_accelerator:
        resident = weights + in_hand + (mapped - held if network.checkpoint is not None else 0)
        return Memory(resident * sides + working, 0)
    there = network.checkpoint is None and not network.placement.moves_weights
    of_network = weights if there else weights - held + of_blocks(whole)
    of_teacher = weights - held + of_blocks([method for method in whole if "teacher" in method.requires])
    at_rest = weights if network.placement.moves_weights else 0
    copied = weights if sides > 1 and network.checkpoint is None else 0  # a teacher in memory rests on the host
    outputs = 2 * sides * activations(network, read) if network.checkpoint is None and needs_calls(recipe) else 0
    device = of_network + (sides - 1) * of_teacher + sides * in_hand + working
    return Memory(mapped + at_rest + copied + outputs + in_hand, device)


def _held_of_blocks(held: int, processes: int, methods: Sequence[Method | RuntimePolicy[Any]]) -> int:
    """Bytes of the blocks that methods hold at once on the device: all, or a part where each of them lets processes share them out."""
    shared = all(isinstance(method, RuntimePolicy) and method.shards_weights for method in methods)
    return (held // processes if shared else held) if methods else 0


def too_large(network: Network, recipe: Recipe, read: CalibrationSize, processes: Processes = ALONE) -> Iterator[str]:
    """Say which memory cannot hold the run, even with calls of one sample; a machine's memory has to hold all its processes."""
    least = peak_memory(network, recipe, read._replace(at_once=min(read.sample, read.at_once)), processes.count)
    together = processes.on_machine
    place, host = network.placement, host_memory()
    there = place.memory()
    if place.on_accelerator and there is not None and least.device > there:
        yield (
            f"it needs about {phrases.size(least.device)} on {place.device}, which has {phrases.size(there)}; give device cpu, "
            "another device, or shorter samples"
        )
    if together * least.host > host:
        needed = phrases.size(together * least.host)
        if together == 1:
            yield f"it needs about {needed} of memory, and this machine has {phrases.size(host)}; give a larger machine"
        else:
            of_each = f"{together} processes with {phrases.size(least.host)} each"
            yield f"it needs about {needed} of memory ({of_each}), and this machine has {phrases.size(host)}; start fewer processes"


def _working(network: Network, recipe: Recipe, read: CalibrationSize) -> int:
    """Bytes that rounding the largest weight of a block or calibrating it takes."""
    blocks = network.blocks().values()
    largest = max((inputs * outputs for module in blocks for inputs, outputs in _shapes(module)), default=0)
    working = 4 * _ROUNDING * largest
    if needs_calls(recipe):
        held = max((step.method.cost(read).activation_bytes for step in recipe.steps), default=0.0)
        working = max([working, *(_calibrating(module, read, held) for module in blocks)])
    return working


def _calibrating(block: nn.Module, read: CalibrationSize, held: float) -> int:
    """Bytes of activations and of the Hessians of a block's inputs, all in float32."""
    shapes = _shapes(block)
    widths = {inputs for inputs, _ in shapes}
    in_hand = 4 * read.at_once * sum(inputs + outputs for inputs, outputs in shapes)
    # Calls that wait inside a block hold the residual stream and the widest input; where that is too much, none waits.
    waiting = 4 * read.tokens * (3 * min(widths, default=0) + max(widths, default=0))
    moments = 4 * (sum(width**2 for width in widths) + _FACTORING * max(widths, default=0) ** 2)
    return in_hand + (waiting if waiting <= held else 0) + moments


def activations(network: Network, read: CalibrationSize) -> int:
    """Estimate what the outputs of two blocks take."""
    narrowest = min((inputs for block in network.blocks().values() for inputs, _ in _shapes(block)), default=0)
    return 2 * 4 * read.tokens * narrowest


def _shapes(block: nn.Module) -> set[tuple[int, int]]:
    """(inputs, outputs) of the kinds of linear layers of a block; experts of one kind count once."""
    return {size(part) for part in block.modules() if isinstance(part, Layer)}


def needs_calls(recipe: Recipe) -> bool:
    """Return True where a step of the recipe reads activations."""
    return any("calls" in step.method.requires for step in recipe.steps)


def needs_teacher(recipe: Recipe) -> bool:
    """Return True where a step asks for the model as it was before any step, which for a policy before all changes is the model."""
    changing = [number for number, step in enumerate(recipe.steps) if not isinstance(step.method, RuntimePolicy)]
    return any("teacher" in step.method.requires for step in recipe.steps[min(changing, default=len(recipe.steps)) :])


def seconds(
    recipe: Recipe, sizes: Sizes, shapes: Sequence[tuple[int, int]], read: CalibrationSize, flops_a_second: Callable[[], float]
) -> dict[StageName, float]:
    """Estimate what each stage takes, where layers of these (inputs, outputs) are quantized, at the rate of matrix products given."""
    rate = flops_a_second()
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    blockwise = [step.method for step in recipe.steps if isinstance(step.method, BlockMethod) and "calls" in step.method.requires]
    costs = [method.cost(read) for method in blockwise]
    passed = read.tokens * sum(cost.block_passes for cost in costs) + _FITTING * read.sample * sum(cost.fitted_samples for cost in costs)
    through = sum(step.method.cost(read).model_tokens for step in recipe.steps)
    moments = sum(inputs**2 for inputs, _ in shapes) if blockwise else 0
    return {
        "load": sizes.source / _BYTES_A_SECOND,
        "check": sizes.source / _BYTES_A_SECOND,
        "compress": (2 * (weights * passed + sizes.active * through) + moments * read.tokens + 20 * weights) / rate
        + sizes.source / _BYTES_A_SECOND,
        "save": sizes.source / _BYTES_A_SECOND,
        "evaluate": 2 * sizes.parameters * _EVALUATED_TOKENS / rate,
    }


def measured_flops_a_second(device: torch.device = HOST) -> float:
    """Matrix-product rate of a device in float32, timed for a moment, once a process and number of threads."""
    return _timed(device, torch.get_num_threads())


@cache
def _timed(device: torch.device, threads: int) -> float:
    size = _CPU_PRODUCT if device.type == HOST.type else _ACCELERATOR_PRODUCT
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    a @ b
    count, elapsed, start = 0, 0.0, synchronized_clock.now(device)
    while elapsed < _TIMED_SECONDS:
        a @ b
        count += 1
        elapsed = synchronized_clock.now(device) - start
    return 2 * size**3 * count / elapsed
