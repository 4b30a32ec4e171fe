"""The dry run: what a recipe will touch and leave, what it will weigh on disk and in memory, how long it takes; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerogel.engine.calibration import CalibrationInput, reading, shown
from aerogel.engine.opening import open_model
from aerogel.engine.progress import StageName
from aerogel.evaluate.measure import TextMeasure
from aerogel.kernels import synchronized_clock
from aerogel.layers import layout
from aerogel.layers.conv import Layer, refuse, size
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.layers.slots import Slot, slots
from aerogel.methods.base import BlockMethod, CalibrationSize, Method, RuntimePolicy, WeightMethod
from aerogel.model.block import Block
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.trace import NON_BLOCK
from aerogel.numerics.scheme import Scheme
from aerogel.recipe import Recipe
from aerogel.runtime.expert_skipping.routing import shape_of

_GROUPS = (32, 48, 64, 96, 128, 192, 256)
_BYTES_A_SECOND = 300e6
# Pages of the files being read count as memory until they are closed.
_MAPPED = 32 << 20
# Matrices of the size of a second moment that are alive while one is factored, and of the size of a weight while it is rounded.
_FACTORING = 5
_ROUNDING = 6
# Forwards that an optimiser step is worth: one, and twice that for its gradients.
_FITTING = 3
# Perplexity and agreement both read both networks, in windows that overlap.
_EVALUATED_TOKENS = 4 * TextMeasure.tokens * TextMeasure.length // TextMeasure.stride


@dataclass(frozen=True)
class Touched:
    """A linear that the recipe stores in a scheme."""

    name: str
    method: str
    scheme: str
    inputs: int
    outputs: int
    bytes: int
    """What its tensors take on disk."""


@dataclass(frozen=True)
class Kept:
    """A linear or an embedding that the recipe leaves in float, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a network."""

    recipe: str
    parameters: int
    """Weights of the whole network; shared ones count once."""
    source_bytes: int
    predicted_bytes: int
    """All tensors on disk after compression; exact, save for the headers of the files."""
    peak_memory_bytes: int
    """Over the interpreter's own: an estimate."""
    activation_bytes: int
    """What the outputs of two blocks take beside the output while the run lasts; an estimate."""
    seconds: dict[StageName, float]
    """By stage, from a matrix product timed on this machine: an estimate."""
    touched: tuple[Touched, ...] = ()
    kept: tuple[Kept, ...] = ()
    problems: tuple[str, ...] = field(default=())
    """Why the recipe cannot run on this network; empty when it can."""

    @property
    def share_reached(self) -> float:
        """The part of all weights that the recipe stores in a scheme."""
        return sum(linear.inputs * linear.outputs for linear in self.touched) / max(self.parameters, 1)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {**asdict(self), "share_reached": self.share_reached}


def plan(
    model: Network | nn.Module | str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    samples: CalibrationInput | None = None,
) -> Plan:
    """Say what a recipe will do to a model without changing a weight; raises AerogelError when either cannot be read."""
    network = open_model(model)
    return plan_network(network, Recipe.parse(recipe, overrides), reading(network, shown(network, samples)))


def plan_network(network: Network, recipe: Recipe, read: CalibrationSize) -> Plan:
    """The plan for a network that is open already."""
    touched, problems = _touched(network, recipe)
    sizes = _Sizes.of(network, {linear.name for linear in touched})
    return Plan(
        recipe=recipe.name,
        parameters=sizes.parameters,
        source_bytes=sizes.source,
        predicted_bytes=sizes.untouched + sum(linear.bytes for linear in touched),
        peak_memory_bytes=_peak_memory(network, recipe, read),
        activation_bytes=_activations(network, read) if needs_calls(recipe) else 0,
        seconds=_seconds(recipe, sizes, touched, read),
        touched=tuple(touched),
        kept=tuple(_kept(network, recipe, {linear.name for linear in touched})),
        problems=(*problems, *_out_of_order(recipe)),
    )


def blocks_of(network: Network) -> Iterator[Block]:
    """Every block without calls, in list order; the network around its blocks, named '', comes last."""
    modules = {**network.blocks(), NON_BLOCK: network.module}
    for position, (name, module) in enumerate(modules.items()):
        yield Block(name, module, position, len(modules), (), network)


def _out_of_order(recipe: Recipe) -> Iterator[str]:
    """Yield the steps that cannot follow a policy that skips modules, and policies that cannot follow the one before them."""
    last: RuntimePolicy[Any] | None = None
    for number, step in enumerate(recipe.steps):
        if not isinstance(step.method, RuntimePolicy):
            continue
        for later in recipe.steps[number + 1 :] if step.method.skips_modules else ():
            if "uncached" not in later.method.requires:
                continue
            if isinstance(later.method, RuntimePolicy) and later.method.skips_modules:
                yield f"{later.name} comes after {step.name}, and a model has one feature cache; leave one of them out"
            else:
                yield f"{later.name} comes after {step.name}, but needs a model of which every module runs; put {step.name} last"
        if why := step.method.refusal(last):
            yield why
        last = step.method


def _touched(network: Network, recipe: Recipe) -> tuple[list[Touched], list[str]]:
    touched: dict[str, Touched] = {}
    problems: list[str] = []
    refused: dict[str, list[str]] = {}
    for step in recipe.steps:
        found = _stored_by(step.method, network)
        if not found and isinstance(step.method, WeightMethod):
            problems.append(f"{step.name} reaches no linear of this network; check its targets and ignore")
        for name, (linear, scheme) in found.items():
            inputs, outputs = size(linear)
            if reason := refuse(linear, scheme):
                refused.setdefault(f"cannot take {scheme}: {reason}{_fitting(scheme, inputs)}", []).append(name)
            else:
                # The first step that stores a linear in codes leaves nothing for later ones.
                touched.setdefault(name, Touched(name, step.name, str(scheme), inputs, outputs, _bytes(network, name, linear, scheme)))
    for reason, names in refused.items():
        more = f" and {len(names) - 1} other linears" if len(names) > 1 else ""
        problems.append(f"{names[0]}{more} {reason}")
    return list(touched.values()), problems


def _stored_by(method: Any, network: Network) -> dict[str, tuple[Layer, Scheme]]:
    """The float layers that a method puts into codes, with their schemes, by full name."""
    if isinstance(method, WeightMethod):
        return {block.full_name(name): got for block in blocks_of(network) for name, got in method.assign(block).items()}
    return method.stores(network) if isinstance(method, Method) else {}


def _fitting(scheme: Scheme, columns: int) -> str:
    fitting = [str(size) for size in _GROUPS if columns % size == 0]
    return f" (groups that fit: {', '.join(fitting)})" if scheme.group and columns % scheme.group and fitting else ""


def _bytes(network: Network, name: str, linear: Layer, scheme: Scheme) -> int:
    dtype = _stored_dtype(network, f"{name}.weight", linear.weight)
    tensors = layout.blank(*size(linear), scheme, dtype, "meta")
    bias = 0 if linear.bias is None else linear.bias.numel() * dtype.itemsize
    return sum(tensor.nbytes for tensor in tensors.values()) + bias


def _stored_dtype(network: Network, name: str, tensor: torch.Tensor) -> torch.dtype:
    if network.checkpoint is not None and name in network.checkpoint:
        return network.checkpoint.dtype(name)
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return network.stored_dtype if wide and network.stored_dtype else tensor.dtype


def _unique_slots(network: Network) -> list[Slot]:
    """Places of stored tensors, one for each tensor however many modules share it."""
    return list({id(slot.tensor): slot for slot in reversed(list(slots(network.module)))}.values())


@dataclass(frozen=True)
class _Sizes:
    parameters: int
    source: int
    untouched: int
    """Bytes on disk of the tensors that the recipe leaves."""
    active: float
    """Parameters that a token passes: of a mixture's experts those that it goes to."""

    @classmethod
    def of(cls, network: Network, touched: set[str]) -> _Sizes:
        stored = [(slot, slot.tensor.numel() * _stored_dtype(network, slot.name, slot.tensor).itemsize) for slot in _unique_slots(network)]
        left = sum(size for slot, size in stored if slot.name.rpartition(".")[0] not in touched)
        source = network.checkpoint.bytes() if network.checkpoint is not None else sum(size for _, size in stored)
        parameters = sum(slot.tensor.numel() for slot, _ in stored if isinstance(slot.tensor, nn.Parameter))
        parameters += _coded_weights(network)
        return cls(parameters, source, left, parameters - _resting(network))


def _resting(network: Network) -> float:
    """Weights of experts that an average token does not go to."""
    found = [part for part in network.module.modules() if isinstance(part, ExpertList)]
    weights = sum(inputs * outputs for part in found for inputs, outputs in (size(one) for one in part.modules() if isinstance(one, Layer)))
    return weights * (1 - shape_of(network).top_k / shape_of(network).experts) if found else 0.0


def _coded_weights(network: Network) -> int:
    return sum(part.in_features * part.out_features for part in network.module.modules() if isinstance(part, QuantLinear))


def _kept(network: Network, recipe: Recipe, touched: set[str]) -> Iterator[Kept]:
    methods = [step.method for step in recipe.steps if isinstance(step.method, WeightMethod)]
    for name, module in network.module.named_modules():
        if name in touched:
            continue
        if isinstance(module, QuantLinear):
            yield Kept(name, module.in_features * module.out_features, "quantized already")
        elif isinstance(module, Layer | nn.Embedding):
            yield Kept(name, sum(parameter.numel() for parameter in module.parameters()), _reason(network, name, module, methods))


def _reason(network: Network, name: str, module: nn.Module, methods: list[WeightMethod]) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding, not a linear"
    if matches(name, network.family.never_quantize):
        return "kept by the family"
    if any(matches(name, network.family.expand_patterns(method.ignore), module) for method in methods):
        return "ignored by the recipe"
    return "not among the recipe's targets"


def _peak_memory(network: Network, recipe: Recipe, read: CalibrationSize) -> int:
    """What stays resident, the block in hand twice, and what calibrating it or rounding its largest weight takes."""
    blocks = network.blocks()
    sizes = {name: sum(p.numel() * p.element_size() for p in module.parameters()) for name, module in blocks.items()}
    total = sum(slot.tensor.nbytes for slot in _unique_slots(network))
    if network.checkpoint is not None:
        total += min(_MAPPED, network.checkpoint.bytes()) - sum(sizes.values())
    largest = max((inputs * outputs for module in blocks.values() for inputs, outputs in _shapes(module)), default=0)
    working = 4 * _ROUNDING * largest
    if needs_calls(recipe):
        held = max((step.method.cost(read).activation_bytes for step in recipe.steps), default=0.0)
        working = max([working, *(_calibrating(module, read, held) for module in blocks.values())])
    resident = total + 2 * max(sizes.values(), default=0)
    return resident * (2 if needs_teacher(recipe) else 1) + working


def _calibrating(block: nn.Module, read: CalibrationSize, held: float) -> int:
    """Bytes of activations and of the second moments of a block's inputs, all in float32."""
    shapes = _shapes(block)
    widths = {inputs for inputs, _ in shapes}
    in_hand = 4 * read.at_once * sum(inputs + outputs for inputs, outputs in shapes)
    # Calls that wait inside a block hold the residual stream and the widest input; where that is too much, none waits.
    waiting = 4 * read.tokens * (3 * min(widths, default=0) + max(widths, default=0))
    moments = 4 * (sum(width**2 for width in widths) + _FACTORING * max(widths, default=0) ** 2)
    return in_hand + (waiting if waiting <= held else 0) + moments


def _activations(network: Network, read: CalibrationSize) -> int:
    narrowest = min((inputs for block in network.blocks().values() for inputs, _ in _shapes(block)), default=0)
    return 2 * 4 * read.tokens * narrowest


def _shapes(block: nn.Module) -> set[tuple[int, int]]:
    """(inputs, outputs) of the kinds of linears of a block; experts of one kind count once."""
    return {size(part) for part in block.modules() if isinstance(part, Layer)}


def needs_calls(recipe: Recipe) -> bool:
    """Whether a step of the recipe looks at what passes through the network."""
    return any("calls" in step.method.requires for step in recipe.steps)


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a step asks for the network as it was before any step; to a policy that comes before all changes it is the network itself."""
    changing = [number for number, step in enumerate(recipe.steps) if not isinstance(step.method, RuntimePolicy)]
    return any("teacher" in step.method.requires for step in recipe.steps[min(changing, default=len(recipe.steps)) :])


def _seconds(recipe: Recipe, sizes: _Sizes, touched: list[Touched], read: CalibrationSize) -> dict[StageName, float]:
    rate = _flops_a_second()
    weights = sum(linear.inputs * linear.outputs for linear in touched)
    blockwise = [step.method for step in recipe.steps if isinstance(step.method, BlockMethod) and "calls" in step.method.requires]
    costs = [method.cost(read) for method in blockwise]
    passed = read.tokens * sum(cost.block_passes for cost in costs) + _FITTING * read.sample * sum(cost.fitted_samples for cost in costs)
    through = sum(step.method.cost(read).model_tokens for step in recipe.steps)
    moments = sum(linear.inputs**2 for linear in touched) if blockwise else 0
    return {
        "load": sizes.source / _BYTES_A_SECOND,
        "check": sizes.source / _BYTES_A_SECOND,
        "compress": (2 * (weights * passed + sizes.active * through) + moments * read.tokens + 20 * weights) / rate
        + sizes.source / _BYTES_A_SECOND,
        "save": sizes.source / _BYTES_A_SECOND,
        "evaluate": 2 * sizes.parameters * _EVALUATED_TOKENS / rate,
    }


def _flops_a_second(size: int = 768, seconds: float = 0.05) -> float:
    """Matrix-product rate of this machine in float32, timed for a moment."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    a @ b
    count, elapsed, start = 0, 0.0, synchronized_clock.host_clock()
    while elapsed < seconds:
        a @ b
        count += 1
        elapsed = synchronized_clock.host_clock() - start
    return 2 * size**3 * count / elapsed
