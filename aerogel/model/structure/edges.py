"""Edges of a block: whose output channels feed whose input columns, found by scaling sources and verified by folding random scales.

Legend: R rows of a source, C channels of an edge (the rows that take a scale), I input columns of a sink.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.layers.experts import ExpertList
from aerogel.layers.replacement import Replacement
from aerogel.model.calls import Call
from aerogel.model.edges import Edge, fold
from aerogel.model.hooks import temporary_hooks
from aerogel.model.shared_entries import own_copy, tensors_kept_by
from aerogel.model.structure.attention import Attention, attentions_in
from aerogel.model.structure.examples import Example, run
from aerogel.model.structure.fused_rows import rows_read_linearly
from aerogel.model.structure.gains import Gain, gains_in
from aerogel.model.structure.modulation import Modulation, modulations_in
from aerogel.model.structure.placeholders import placeholder_weights, replaced_tensors
from aerogel.model.structure.probe import Probe, Refused, Sink
from aerogel.model.structure.stream import BlockStream, StreamSearch


@dataclass
class BlockEdges:
    """The edges of one kind of block, and why other layers are no sources."""

    edges: list[Edge] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    attentions: tuple[Attention, ...] = ()
    stream: BlockStream | None = None
    """Its part in the residual stream; None where a rotation does not pass."""
    no_stream: str = "the block did not run in an example"
    """The reason why there is none."""


def edges_by_block(module: nn.Module, blocks: Sequence[str], examples: Sequence[Example]) -> dict[str, BlockEdges]:
    """Find the edges of all blocks: of one block of each kind that an example reaches, and the same for all others of the kind.

    A block in which a layer was replaced already has none: quantized weights cannot be scaled.
    """
    replaced, unseen = BlockEdges(no_stream="layers in it were replaced already"), BlockEdges()
    found = {name: replaced if has_replaced_layers(module.get_submodule(name)) else unseen for name in blocks}
    for names, block, call in first_of_each_kind(module, blocks, examples):
        found |= dict.fromkeys(names, _edges_or_reason(block, call))
    shared = shared_layers(module, blocks)
    return {name: _without(edges, shared[name]) if shared[name] else edges for name, edges in found.items()}


def has_replaced_layers(block: nn.Module) -> bool:
    """Return True for a block in which a layer was replaced, by a quantized one for example."""
    return any(isinstance(part, Replacement) for part in block.modules())


def first_of_each_kind(
    module: nn.Module, blocks: Sequence[str], examples: Sequence[Example]
) -> Iterator[tuple[list[str], nn.Module, Call]]:
    """Yield the names of all blocks of a kind, the first that an example reaches, and a call of it; none where a layer was replaced."""
    kinds: dict[Any, list[str]] = {}
    for name in blocks:
        if not has_replaced_layers(module.get_submodule(name)):
            kinds.setdefault(_kind(module.get_submodule(name)), []).append(name)
    calls: dict[str, Call] = {}
    for example in examples:
        handles = [module.get_submodule(name).register_forward_pre_hook(keeping(calls, name), with_kwargs=True) for name in blocks]
        with temporary_hooks(handles), placeholder_weights(module):
            run(module, example)
    for names in kinds.values():
        first = next((name for name in names if name in calls), None)
        if first is not None:
            yield names, module.get_submodule(first), calls[first]


def shared_layers(module: nn.Module, blocks: Sequence[str]) -> dict[str, set[str]]:
    """Layers of each block whose weights something outside of it has too: what is folded into them would act there as well."""
    owners: dict[int, set[str]] = {}
    own = {name: block for block in blocks for name, _ in module.get_submodule(block).named_parameters(block, remove_duplicate=False)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(own.get(name, ""))
    return {
        block: {
            name.rpartition(".")[0]
            for name, parameter in module.get_submodule(block).named_parameters(remove_duplicate=False)
            if len(owners[id(parameter)]) > 1
        }
        for block in blocks
    }


def _without(found: BlockEdges, layers: set[str]) -> BlockEdges:
    """The same without the edges of some layers, and without a stream, which passes them all."""
    kept = [edge for edge in found.edges if not layers & {*edge.sources, *edge.sinks}]
    refused = {
        source: "its weight is shared with another part of the model" for edge in found.edges if edge not in kept for source in edge.sources
    }
    return BlockEdges(kept, found.refused | refused, found.attentions, None, "its weights are shared with another part of the model")


def _edges_or_reason(block: nn.Module, call: Call) -> BlockEdges:
    try:
        return edges_of(block, call)
    except Exception as error:  # noqa: BLE001  whatever the code of a block raises when it runs by itself
        reason = str(error).strip().partition("\n")[0]
        return BlockEdges(no_stream=f"the block cannot be run by itself ({type(error).__name__}: {reason})")


def _kind(block: nn.Module) -> Any:
    """Class, names and shapes of a block: blocks of one kind have the same edges."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return type(block), shapes, tuple(type(part) for part in block.modules())


def edges_of(block: nn.Module, call: Call, seed: int = 0) -> BlockEdges:
    """Find and verify the edges of a block with inputs like those it gets; its weights are not read, random ones stand for them."""
    found = BlockEdges()
    with random_weights(block, seed):
        parameters = parameters_of(block)
        inputs: dict[str, Call] = {}
        handles = [part.register_forward_pre_hook(keeping(inputs, name), with_kwargs=True) for name, part in block.named_modules() if name]
        call = call.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        with temporary_hooks(handles):
            probe = Probe(lambda: run_copied(block, call), parameters)
        gains = list(gains_in(block, inputs))
        search = _Search(block, probe, found)
        search.norms(gains)
        search.linears()
        search.pairs()
        search.modulations()
        search.verify()
        found.attentions = tuple(attentions_in(block, probe))
        try:
            found.stream = StreamSearch(block, probe, call, gains, found.edges).found(search.unread)
        except Refused as refused:
            found.no_stream = str(refused)
    found.edges = [copy for edge in found.edges for copy in _of_every_expert(block, edge)]
    return found


def run_copied(block: nn.Module, call: Call) -> Any:
    """One forward on copies of the inputs, which code may change in place: what it writes for others is given like an output."""
    copied = call.map(torch.clone)
    args = tuple(own_copy(value) for value in copied.args)
    kwargs = {name: own_copy(value) for name, value in copied.kwargs.items()}
    output = block(*args, **kwargs)
    return output, [tensors_kept_by(value) for value in (*args, *kwargs.values())]


class _Search:
    """Search for the edges of one block."""

    def __init__(self, block: nn.Module, probe: Probe, found: BlockEdges) -> None:
        self._block, self._probe, self._found = block, probe, found
        self._linears: list[str] = []
        read = {name.rpartition(".")[0] for (name, *_), recorded in probe.reads.items() if recorded.x.numel()}
        unread = [name for name, part in block.named_modules() if isinstance(part, nn.Linear | nn.Conv2d) and name not in read]
        self.unread = [name for name in unread if first_expert(block, name) == name]
        """Layers that did not run; of the experts of a list the first one stands for all."""

    def norms(self, gains: Sequence[Gain]) -> None:
        """Try the norms, and whatever else multiplies by a vector."""
        for gain in gains:
            if gain.module in {name.rpartition(".")[0] for name, *_ in self._probe.reads}:
                continue
            rows_R = torch.ones(gain.parameter.numel(), dtype=torch.bool)
            self._try((gain.module,), rows_R, gain)

    def linears(self) -> None:
        """Try every product, with all rows and then with those that are read as they are."""
        for name in dict.fromkeys(name for name, *_ in self._probe.reads):
            module, rows = self._source(name)
            if module is None:
                continue
            self._linears.append(module)
            if not self._try((module,), torch.ones(rows, dtype=torch.bool)) and not _is_final(self._found.refused[module]):
                rows_R = rows_read_linearly(self._probe, name)
                if rows_R is not None and not rows_R.all():
                    self._try((module,), rows_R)

    def pairs(self) -> None:
        """Try refused layers two by two, where both stand in one module: values of text and image go into one row of tokens."""
        left = [name for name in self._linears if name in self._found.refused and not _is_final(self._found.refused[name])]
        for one, other in combinations(left, 2):
            rows = [self._source(f"{name}.weight")[1] for name in (one, other)]
            before = dict(self._found.refused)
            beside = one.rpartition(".")[0] == other.rpartition(".")[0] and rows[0] == rows[1]
            if beside and {one, other} <= before.keys() and not self._try((one, other), torch.ones(rows[0], dtype=torch.bool)):
                self._found.refused.update(before)

    def modulations(self) -> None:
        """Try parts of refused layers that multiply what a norm gives, with those that are added to it."""
        for name in [name for name in self._linears if name in self._found.refused]:
            parameter = f"{name}.weight"
            for modulation in modulations_in(self._probe, parameter):
                if modulation.offset and getattr(self._block.get_submodule(name), "bias", None) is None:
                    self._found.refused[name] = "it modulates without a bias, which would have to take up the one that is added"
                    continue
                rows_R = torch.zeros(self._source(parameter)[1], dtype=torch.bool)
                rows_R[modulation.rows_I] = True
                self._try((name,), rows_R, modulation=modulation)

    def verify(self) -> None:
        """Fold random scales into all edges at once and run the block; edges that change what it gives are dropped and named."""
        if self._holds(self._found.edges):
            return
        for edge in list(self._found.edges):
            if not self._holds([edge]):
                self._found.edges.remove(edge)
                self._found.refused[edge.sources[0]] = "folding a scale changes what the block gives"

    def _try(self, sources: tuple[str, ...], rows_R: Tensor, gain: Gain | None = None, modulation: Modulation | None = None) -> bool:
        names = tuple(f"{source}.weight" for source in sources)
        try:
            if gain is not None:
                sinks = self._probe.sinks(rows_R, changed=gain.scaled)
            else:
                sinks = self._probe.sinks(rows_R, of=names, scaled=modulation.scaled if modulation is not None else None)
            edge = self._edge(sources, sinks, gain)
            if modulation is not None:
                edge = modulation.completed(edge)
        except Refused as refused:
            self._found.refused.update(dict.fromkeys(sources, str(refused)))
            return False
        for source in sources:
            self._found.refused.pop(source, None)
        self._found.edges.append(edge)
        return True

    def _edge(self, sources: tuple[str, ...], sinks: Mapping[str, Sink], gain: Gain | None) -> Edge:
        first = next(iter(sinks.values()))
        for name, sink in sinks.items():
            (recorded, *_) = self._probe.of(name)
            if not name.endswith(".weight") or recorded.read.in_dim != 1 or recorded.read.out_dim != 0:
                raise Refused(f"{name} reads it and is laid out otherwise than linear layers are")
            if not torch.equal(sink.rows_I, first.rows_I) or sink.power != first.power:
                raise Refused("layers read it in unlike ways")
        width, rows = len(first.rows_I), len(self._block.get_submodule(sources[0]).get_parameter("weight"))
        for name in self.unread:
            layer = self._block.get_submodule(name)
            if isinstance(layer, nn.Linear) and layer.in_features == width:
                raise Refused(f"{name} did not run and may read it")
            if gain is None and isinstance(layer, nn.Linear) and layer.out_features == rows and _home(name) == _home(sources[0]):
                raise Refused(f"{name} did not run and may be read with it")
        return Edge(sources, tuple(name.removesuffix(".weight") for name in sinks), first.rows_I, gain.offset if gain else 0.0, first.power)

    def _source(self, name: str) -> tuple[str | None, int]:
        """Module and rows of a product that can be a source; the reason is kept where it cannot."""
        (recorded, *_) = self._probe.of(name)
        parameter, module = self._probe.parameters[name], name.removesuffix(".weight")
        if module == name or recorded.read.out_dim != 0 or recorded.read.in_dim != 1:
            self._found.refused[name] = "its weight is laid out otherwise than that of a linear layer"
            return None, 0
        return module, parameter.shape[0]

    @torch.no_grad()
    def _holds(self, edges: Sequence[Edge]) -> bool:
        """Fold, run, and fold back: a copy of a large block would not fit beside it."""
        scales = [self._probe.scales(len(edge.rows_C)) for edge in edges]
        for edge, scale_C in zip(edges, scales, strict=True):
            fold(self._block, edge, scale_C)
        same = self._probe.gives(self._probe.run())
        for edge, scale_C in zip(edges, scales, strict=True):
            fold(self._block, edge, 1 / scale_C)
        return same


def _home(name: str) -> str:
    return name.rpartition(".")[0]


def _is_final(why: str) -> bool:
    """Return True for a reason that holds for every part of a source's rows."""
    return why.startswith(("no layer", "the block's output", "its weight"))


def keeping(inputs: dict[str, Call], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(name, Call(args, kwargs).map(torch.clone))

    return hook


def random_weights(block: nn.Module, seed: int) -> Any:
    """Random float64 weights, one set for all experts of a list, whose forward is then that of one expert's memory."""
    generator, shared = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def fill(name: str, tensor: Tensor) -> Tensor:
        first = first_expert(block, name)
        if first not in shared:
            shared[first] = _random(name, tensor, generator)
        return shared[first]

    return replaced_tensors(block, fill)


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or not isinstance(tensor, nn.Parameter):
        values = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
        return values.double() if values.is_floating_point() else values
    # Drawn in float32: twice as fast, and what counts is that no two are alike.
    noise = torch.randn(tensor.shape, generator=generator).double()
    if tensor.ndim > 1:
        return noise.div_(tensor[0].numel() ** 0.5)
    return noise.mul_(0.1) if name.endswith("bias") else noise.mul_(0.2).add_(1.0)


def parameters_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """The block's parameters, of experts of a list those of the first."""
    return {name: parameter for name, parameter in block.named_parameters(remove_duplicate=False) if first_expert(block, name) == name}


def first_expert(block: nn.Module, name: str) -> str:
    """The name of the same part of the first expert; the name itself outside of expert lists."""
    for match in re.finditer(r"\.(\d+)(?=\.|$)", name):
        if isinstance(_part(block, name[: match.start()]), ExpertList):
            return f"{name[: match.start()]}.0{name[match.end() :]}"
    return name


def _part(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _of_every_expert(block: nn.Module, edge: Edge) -> Iterator[Edge]:
    """An edge inside the first expert for each expert, one into the first expert for all of them."""
    lists = [name for name, part in block.named_modules() if isinstance(part, ExpertList)]
    home = next((name for name in lists if edge.sources[0].startswith(f"{name}.")), None)
    if home is not None:
        for number in range(len(block.get_submodule(home))):  # type: ignore[arg-type]
            renamed = [tuple(name.replace(f"{home}.0.", f"{home}.{number}.") for name in names) for names in (edge.sources, edge.sinks)]
            yield replace(edge, sources=renamed[0], sinks=renamed[1])
        return
    yield replace(edge, sinks=names_of_every_expert(block, edge.sinks))


def names_of_every_expert(block: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Names with those of the first expert of a list written out for all of them."""
    lists = {name: len(part) for name, part in block.named_modules() if isinstance(part, ExpertList)}
    found: list[str] = []
    for name in names:
        home = next((home for home in lists if name.startswith(f"{home}.0.")), None)
        count = lists[home] if home is not None else 1
        found += [name.replace(f"{home}.0.", f"{home}.{number}.", 1) for number in range(count)] if home is not None else [name]
    return tuple(found)
