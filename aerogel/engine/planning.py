"""The dry run: what a recipe will touch and leave, what it will weigh on disk and in memory, how long it takes; nothing is changed.

No weight is read and nothing runs, but where float16 is computed in: whether that overflows, only a call of the calibration shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from aerogel.engine.available import available, columns_read
from aerogel.engine.calibration import CalibrationInput, reading, shown, with_batch_size
from aerogel.engine.estimates import (
    Sizes,
    activations,
    measured_flops_a_second,
    needs_calls,
    peak_memory,
    seconds,
    stored_dtype,
    too_large,
)
from aerogel.engine.fused_sets import mixed_sets, unknown_sets
from aerogel.engine.numbers import overflowing
from aerogel.engine.opening import open_model
from aerogel.engine.patterns import unmatched
from aerogel.engine.progress import StageName
from aerogel.engine.requirements import unmet
from aerogel.engine.sharing import in_full, share_of
from aerogel.engine.stages import quantizes_weights
from aerogel.evaluate.measure import positions, vocabulary_size
from aerogel.io.adapters import adapter_in, describe
from aerogel.io.engines import ENGINES, Engine, ServedPolicy, StoredLayer, StoredModel, engine_of, instructions, refusals
from aerogel.io.source import ModelSource
from aerogel.layers import layout
from aerogel.layers.conv import Layer, is_plain, refuse, size
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import Before, BlockMethod, CalibrationSize, Method, RuntimePolicy, TargetedMethod, WeightMethod
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device
from aerogel.model.processes import ALONE, Processes
from aerogel.model.walk import blocks_of
from aerogel.numerics.scheme import Scheme
from aerogel.recipe import Recipe, Step

_GROUPS = (32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Touched:
    """A linear that the recipe stores in a scheme."""

    name: str
    method: str
    scheme: str
    inputs: int
    outputs: int
    bytes: int
    """Bytes that its tensors take on disk."""


@dataclass(frozen=True)
class Kept:
    """A linear or an embedding that the recipe leaves unquantized, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Prediction of what a recipe will do to a model."""

    recipe: str
    parameters: int
    """Weights of the whole network; shared ones count once."""
    source_bytes: int
    predicted_bytes: int
    """All tensors on disk after compression; exact, save for the headers of the files."""
    peak_memory_bytes: int
    """Of the host, over the interpreter's own: an estimate. Each of several processes takes as much."""
    device: str
    """Name of the device that computes."""
    device_memory_bytes: int
    """Of the accelerator of a process: an estimate; 0 where the CPU computes."""
    activation_bytes: int
    """Bytes that the outputs of two blocks take beside the output while the run lasts; an estimate."""
    seconds: dict[StageName, float]
    """By stage, from a matrix product timed on the device: an estimate."""
    touched: tuple[Touched, ...] = ()
    kept: tuple[Kept, ...] = ()
    remarks: tuple[str, ...] = ()
    """Notes on what steps will leave undone, though they can run."""
    problems: tuple[str, ...] = field(default=())
    """Why the recipe cannot run on this network; empty when it can."""
    processes: int = 1
    """Processes that share the run."""
    processes_on_machine: int = 1
    """Processes on one machine, which share its memory."""
    engines: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Engines by their release, and why each does not open the result; none where it does. Empty where nothing is quantized."""
    instructions: dict[str, str] = field(default_factory=dict)
    """The instruction set that an engine needs to open the result, for those that open it on some processors only."""

    @property
    def share_reached(self) -> float:
        """The part of all weights that the recipe stores in a scheme."""
        return sum(linear.inputs * linear.outputs for linear in self.touched) / max(self.parameters, 1)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {**asdict(self), "share_reached": self.share_reached}


def plan(
    model: Network | nn.Module | ModelSource | str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    samples: CalibrationInput | None = None,
    device: Device = AUTO,
    batch_size: int | Literal["auto"] = AUTO,
    processes: Processes = ALONE,
    engine: str | None = None,
    flops_a_second: Callable[[], float] | None = None,
) -> Plan:
    """Say what a recipe will do to a model without changing a weight; raises AerogelError when either cannot be read.

    `device`, `batch_size`, `processes` and `engine` are those of `compress`. `flops_a_second` gives the matrix-product rate from which
    seconds are estimated: that of the device, measured for a moment.
    """
    wanted = engine_of(engine)
    parsed = Recipe.parse(recipe, overrides)
    network = open_model(model, device=device, dequantize=quantizes_weights(parsed))
    read = with_batch_size(shown(network, samples), batch_size, processes.count)
    columns: tuple[str, ...] = ()
    if needs_calls(parsed):
        read = available(network, read)
        columns = columns_read(read)
    made = plan_network(network, parsed, reading(network, read), flops_a_second, processes, wanted)
    if not made.problems:
        made = replace(made, problems=tuple(overflowing(network, read if needs_calls(parsed) else None)))
    return replace(made, remarks=(*made.remarks, *columns)) if columns and not made.problems else made


def plan_network(
    network: Network,
    recipe: Recipe,
    read: CalibrationSize,
    flops_a_second: Callable[[], float] | None = None,
    processes: Processes = ALONE,
    engine: Engine | None = None,
) -> Plan:
    """Return the plan for a network that is open already; what the engine, if one is given, does not open is a problem."""
    touched, schemes, problems = _touched(network, recipe, read)
    shapes = {} if problems else _reshaped(network, recipe.steps)
    mixed, unknown = tuple(mixed_sets(network, schemes)), unknown_sets(network, schemes)
    stored = _stored(network, recipe, touched, schemes)
    opened = _opened_by(network, recipe, stored, mixed=bool(mixed))
    if engine is not None:
        problems += [f"{engine.label} does not open the result: {reason}" for reason in opened.get(engine.label, ())]
    read = share_of(recipe, read, processes)
    problems += too_large(network, recipe, read, processes)
    problems += _too_long(network, recipe, read)
    problems += _too_many_tokens(network)
    gone = _removed(network, recipe) if not problems else frozenset()
    touched = [linear for linear in touched if linear.name not in gone]
    sizes = Sizes.of(network, {linear.name for linear in touched} | gone, shapes)
    memory = peak_memory(network, recipe, read, processes.count)
    rate = flops_a_second or partial(measured_flops_a_second, network.device)
    return Plan(
        recipe=recipe.name,
        parameters=sizes.parameters,
        source_bytes=sizes.source,
        predicted_bytes=sizes.untouched + sum(linear.bytes for linear in touched) + (network.unbuilt.bytes if network.unbuilt else 0),
        peak_memory_bytes=memory.host,
        device=str(network.device),
        device_memory_bytes=memory.device,
        activation_bytes=processes.count * activations(network, read) if needs_calls(recipe) else 0,
        seconds=seconds(recipe, sizes, [(linear.inputs, linear.outputs) for linear in touched], read, rate),
        touched=tuple(touched),
        kept=tuple(_kept(network, recipe, {linear.name for linear in touched})),
        remarks=() if problems else (*_remarks(network, recipe), *mixed, *unknown, *in_full(network, recipe, processes)),
        problems=tuple(problems),
        processes=processes.count,
        processes_on_machine=processes.on_machine,
        engines=opened,
        instructions=_instructions(recipe, stored, opened),
    )


def _reshaped(network: Network, steps: Sequence[Step]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that have another after these steps, by full name."""
    return {name: shape for step in steps if isinstance(step.method, Method) for name, shape in step.method.reshapes(network).items()}


def _removed(network: Network, recipe: Recipe) -> frozenset[str]:
    """Names of the modules of blocks that leave the model, or of as many like them."""
    blocks = [name for step in recipe.steps if isinstance(step.method, Method) for name in step.method.removes(network)]
    inside = tuple(f"{block}." for block in blocks)
    return frozenset(name for name, _ in network.module.named_modules() if name in blocks or (inside and name.startswith(inside)))


def _too_many_tokens(network: Network) -> Iterator[str]:
    """Say that the tokenizer is of another model; tokens that were added to its vocabulary may be of no use in texts."""
    tokenizer, size = getattr(network.processor, "tokenizer", network.processor), vocabulary_size(network)
    own = getattr(tokenizer, "vocab_size", None)
    if size is not None and isinstance(own, int) and own > size and network.family.modality in ("text", "image-text"):
        yield f"the tokenizer has {own} tokens, and the model has embeddings for {size}; give the folder its own tokenizer"


def _too_long(network: Network, recipe: Recipe, read: CalibrationSize) -> Iterator[str]:
    """Say that sequences are longer than the model can tell apart by place."""
    places = positions(network) if network.family.modality in ("text", "image-text") else None
    if needs_calls(recipe) and places is not None and read.length > places:
        yield (
            f"sequences of the calibration have {read.length} tokens, and the model has {places} positions (max_position_embeddings); "
            f"give a length of {places} or less"
        )


def _stored(network: Network, recipe: Recipe, touched: Sequence[Touched], schemes: Mapping[str, Scheme]) -> list[StoredLayer]:
    """Return the quantized layers as engines meet them."""
    in_order = {step.name for step in recipe.steps if isinstance(step.method, BlockMethod) and step.method.groups_in_activation_order}
    experts = tuple(f"{name}." for name, part in network.module.named_modules() if isinstance(part, ExpertList))
    return [
        StoredLayer(schemes[one.name], one.inputs, one.outputs, one.method in in_order, one.name.startswith(experts)) for one in touched
    ]


def _policies(recipe: Recipe) -> dict[str, ServedPolicy]:
    policies = {step.name: step.method for step in recipe.steps if isinstance(step.method, RuntimePolicy)}
    return {name: ServedPolicy(method.config_entries, method.engine_arguments) for name, method in policies.items()}


def _opened_by(network: Network, recipe: Recipe, layers: Sequence[StoredLayer], *, mixed: bool) -> dict[str, tuple[str, ...]]:
    """Return why each engine does not open the result."""
    policies = _policies(recipe)
    denoises = network.family.modality in ("image", "video")
    model = StoredModel(network.config, network.origin)
    found = {engine.label: tuple(refusals(engine, model, layers, policies, mixed, denoises)) for engine in ENGINES.values()}
    return found if layers or policies else {}


def _instructions(recipe: Recipe, layers: Sequence[StoredLayer], opened: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the instruction set that engines need which open the result on some processors only."""
    needed = {engine.label: instructions(engine, layers, _policies(recipe)) for engine in ENGINES.values()}
    return {label: str(needed[label]) for label, reasons in opened.items() if needed[label] and not reasons}


def _remarks(network: Network, recipe: Recipe) -> Iterator[str]:
    if network.source is not None and network.source.adapter is not None and (adapter := adapter_in(network.source.adapter)) is not None:
        yield describe(adapter)
    if network.dequantized is not None:
        yield f"{network.dequantized}; this recipe starts from the dequantized weights"
    yield from (f"{step.name}: {line}" for step in recipe.steps for line in step.method.remarks(network))
    unbuilt = network.unbuilt
    if unbuilt is not None and not any("residual" in step.method.requires for step in recipe.steps):
        size = f"{unbuilt.bytes / 1e6:,.0f} MB"
        yield f"{unbuilt.told}: the model's class has no module for it; kept as it is ({size})"


def _touched(network: Network, recipe: Recipe, read: CalibrationSize) -> tuple[list[Touched], dict[str, Scheme], list[str]]:
    """The layers that each step quantizes, the schemes of all in the end, and why steps cannot be done, in the order of the recipe."""
    touched: dict[str, Touched] = {}
    problems: list[str] = []
    refused: dict[str, list[str]] = {}
    quantized = {name: part.scheme for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, step in enumerate(recipe.steps):
        before = Before(read, dict(quantized), dict(shapes))
        if why := unmet(network, step, recipe.steps[:number], before):
            problems += why
            continue
        problems += unmatched(network, step)
        quantized |= step.method.requantized(network, before)
        shapes |= _reshaped(network, [step])
        found = _stored_by(step.method, network)
        if not found and isinstance(step.method, WeightMethod):
            left, advice = (" that is not quantized yet", ", or give the original model") if quantized else ("", "")
            problems.append(f"{step.name} reaches no linear layer of this model{left}; check its targets and ignore{advice}")
        for name, (layer, scheme) in found.items():
            linear = _as_shaped(layer, shapes.get(f"{name}.weight"))
            inputs, outputs = size(linear)
            if reason := refuse(linear, scheme):
                refused.setdefault(f"cannot take {scheme}: {reason}{_fitting(scheme, inputs)}", []).append(name)
            else:
                # The first step that stores a linear in integer codes leaves nothing for later ones.
                quantized.setdefault(name, scheme)
                touched.setdefault(name, Touched(name, step.name, str(scheme), inputs, outputs, _bytes(network, name, linear, scheme)))
    for reason, names in refused.items():
        more = f" and {len(names) - 1} other linear layers" if len(names) > 1 else ""
        problems.append(f"{names[0]}{more} {reason}")
    return list(touched.values()), quantized, problems


def _stored_by(method: Any, network: Network) -> dict[str, tuple[Layer, Scheme]]:
    """The float layers that a method puts into integer codes, with their schemes, by full name."""
    if isinstance(method, BlockMethod):
        return {block.full_name(name): got for block in blocks_of(network) for name, got in method.assign(block).items()}
    return method.stores(network) if isinstance(method, Method) else {}


def _as_shaped(layer: Layer, shape: tuple[int, ...] | None) -> Layer:
    """Return a layer with nothing in it that has this shape; the layer itself where that is None."""
    if shape is None:
        return layer
    made: Layer = nn.Linear(shape[1], shape[0], bias=layer.bias is not None, device="meta", dtype=layer.weight.dtype)
    return made


def _fitting(scheme: Scheme, columns: int) -> str:
    fitting = [str(size) for size in _GROUPS if columns % size == 0]
    return f" (groups that fit: {', '.join(fitting)})" if scheme.group and columns % scheme.group and fitting else ""


def _bytes(network: Network, name: str, linear: Layer, scheme: Scheme) -> int:
    dtype = stored_dtype(network, f"{name}.weight", linear.weight)
    tensors = layout.blank(*size(linear), scheme, dtype, "meta")
    bias = 0 if linear.bias is None else linear.bias.numel() * dtype.itemsize
    return sum(tensor.nbytes for tensor in tensors.values()) + bias


def _kept(network: Network, recipe: Recipe, touched: set[str]) -> Iterator[Kept]:
    methods = [step.method for step in recipe.steps if isinstance(step.method, TargetedMethod) and step.method.quantizes]
    for name, module in network.module.named_modules():
        if name in touched:
            continue
        if isinstance(module, QuantLinear):
            yield Kept(name, module.in_features * module.out_features, "quantized already")
        elif isinstance(module, Layer | nn.Embedding):
            yield Kept(name, sum(parameter.numel() for parameter in module.parameters()), _reason(network, name, module, methods))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    yield Kept(
                        f"{name}.{key}" if name else key, parameter.numel(), f"of a {type(module).__name__}, which no method reaches"
                    )


def _reason(network: Network, name: str, module: nn.Module, methods: Sequence[TargetedMethod]) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding, not a linear"
    if not is_plain(module):
        return f"a {type(module).__name__}, which does more than multiply"
    if network.never_quantizes(name):
        return "kept by the family"
    if any(matches(name, network.expand_patterns(method.ignore), module) for method in methods):
        return "ignored by the recipe"
    groups = [method.scheme_of(name).group for method in methods if isinstance(method, WeightMethod) and isinstance(module, method.layers)]
    if any(group is not None and size(module)[0] < group for group in groups):
        return "reads fewer inputs than a group has"
    return "not among the recipe's targets"
