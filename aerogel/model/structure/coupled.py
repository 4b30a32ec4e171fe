"""Coupled channels of a block: rows that layers give and columns of the one layer that reads them, in units that can leave together.

Units are the intermediate channels of an FFN, and groups of attention heads with the key-value head that they share. What is found is
verified: when the rows of some units change, exactly their columns change in what the reader gets, and nothing else does. Units are told
apart by the bits of their numbers, so that few runs test all of them; no product is computed again.

Legend: U units, I columns of the reader, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.layers.experts import ExpertList
from aerogel.model.calls import Call
from aerogel.model.structure.attention import Attention, attentions_in
from aerogel.model.structure.edges import first_of_each_kind, parameters_of, random_weights, run_copied, shared_layers
from aerogel.model.structure.examples import Example
from aerogel.model.structure.observer import Read
from aerogel.model.structure.probe import Probe, Refused

Kind = Literal["feed_forwards", "heads", "filters"]
_SAME = 1e-12
"""Relative difference up to which a float64 number has not changed."""
_STAYS = -1
"""Unit of a row that belongs to none and stays."""


@dataclass(frozen=True, eq=False)
class CoupledChannels:
    """Units of one kind that a layer of a block reads, by names in the block."""

    kind: Kind
    reader: str
    """The layer whose columns read the units."""
    units: int
    columns_I: Tensor
    """Unit of each column of the reader."""
    rows: Mapping[str, Tensor]
    """Unit of each row of the parameters that make them, by the names of these; -1 for a row that stays."""

    @property
    def width(self) -> int:
        """Columns of the reader that belong to a unit."""
        return len(self.columns_I) // self.units

    def columns_of(self, unit_K: Tensor) -> Tensor:
        """Return the columns of some units, in order."""
        return torch.isin(self.columns_I, unit_K).nonzero()[:, 0]

    def rows_of(self, parameter: str, unit_K: Tensor) -> Tensor:
        """Return the rows of a parameter that stay with these units, in order."""
        unit_R = self.rows[parameter]
        return (torch.isin(unit_R, unit_K) | (unit_R == _STAYS)).nonzero()[:, 0]


Find = Callable[[nn.Module, Call], tuple[CoupledChannels, ...]]
"""A search for the coupled channels of a block, which is run with inputs like those it gets."""


def coupled_by_block(
    module: nn.Module, blocks: Sequence[str], examples: Sequence[Example], find: Find | None = None
) -> dict[str, tuple[CoupledChannels, ...]]:
    """Find the coupled channels of all blocks: of one block of each kind that an example reaches, and the same for all others of the kind.

    There are none where a layer was replaced, or shares its weight with another part of the model. `find` finds those of one block, by
    default those of FFNs.
    """
    found: dict[str, tuple[CoupledChannels, ...]] = dict.fromkeys(blocks, ())
    for names, block, call in first_of_each_kind(module, blocks, examples):
        try:
            found |= dict.fromkeys(names, (find or coupled_of)(block, call))
        except Exception:  # noqa: BLE001, S112  whatever the code of a block raises when it runs by itself
            continue
    shared = shared_layers(module, blocks)
    return {name: tuple(one for one in each if not shared[name] & layers_of(one)) for name, each in found.items()}


def layers_of(one: CoupledChannels) -> set[str]:
    """Return the names of the layers that make or read coupled channels."""
    return {one.reader, *(name.rpartition(".")[0] for name in one.rows)}


def coupled_of(block: nn.Module, call: Call, seed: int = 0) -> tuple[CoupledChannels, ...]:
    """Find and verify the coupled channels of a block with inputs like those it gets; random weights stand for its own."""
    with random_weights(block, seed):
        call = call.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        probe = Probe(lambda: run_copied(block, call), parameters_of(block))
        attentions = attentions_in(block, probe)
        candidates = [one for attention in attentions for one in _heads(block, attention)]
        candidates += [one for one in _feed_forwards(block, probe) if one.reader not in {name for a in attentions for name in a.outputs}]
        found: dict[str, CoupledChannels] = {}
        for one in candidates:
            if one.reader not in found and _is_verified(probe, one):
                found[one.reader] = one
    return tuple(copy for one in found.values() for copy in _of_every_expert(block, one))


def _feed_forwards(block: nn.Module, probe: Probe) -> Iterator[CoupledChannels]:
    """Yield guesses at channels that layers make and another layer reads one by one: alone, with a gate, or with a gate in one layer."""
    for reader, sources in makers(probe).items():
        if not _is_linear(block, probe, reader) or not all(_is_linear(block, probe, source) for source in sources):
            continue
        columns = block.get_submodule(reader).get_parameter("weight").shape[1]
        rows = {source: len(block.get_submodule(source).get_parameter("weight")) for source in sources}
        units_I = torch.arange(columns)
        if columns < 2 or any(count not in (columns, 2 * columns) for count in rows.values()):
            continue
        layouts = [[units_I] if count == columns else [units_I.repeat(2), units_I.repeat_interleave(2)] for count in rows.values()]
        for chosen in product(*layouts):
            units = dict(zip(sources, chosen, strict=True))
            yield CoupledChannels("feed_forwards", reader, columns, units_I, with_vectors(block, units))


@torch.enable_grad()
def makers(probe: Probe) -> dict[str, tuple[str, ...]]:
    """Return the layers on whose outputs what a layer reads depends with no other layer between, by that layer."""
    made: list[tuple[str, Tensor]] = []
    read: list[tuple[str, Tensor]] = []

    def answer(one: Read) -> Tensor:
        read.append((one.name, one.x))
        y = probe.reads[one.key].y.clone().requires_grad_()
        made.append((one.name, y))
        return y * 1  # the model's code may add to it in place

    probe.run(answer=answer)
    found: dict[str, tuple[str, ...]] = {}
    for name, x in read:
        if not x.requires_grad:
            continue
        slopes = torch.autograd.grad(x.square().sum(), [y for _, y in made], retain_graph=True, allow_unused=True)
        hit = [source for (source, _), slope in zip(made, slopes, strict=True) if slope is not None and bool(slope.any())]
        found[_layer(name)] = tuple(dict.fromkeys((*found.get(_layer(name), ()), *map(_layer, hit))))
    return {name: sources for name, sources in found.items() if sources and name not in sources}


def _heads(block: nn.Module, attention: Attention) -> Iterator[CoupledChannels]:
    """Yield guesses at where the heads of an attention lie: in a row, in sections of a fused layer, or shared by all heads."""
    units, sources = attention.key_heads, tuple(dict.fromkeys((*attention.queries, *attention.keys, *attention.values)))
    parts = dict(block.named_modules())
    linears = all(isinstance(parts.get(name), nn.Linear) for name in (*sources, *attention.outputs))
    if len(attention.outputs) != 1 or units < 2 or attention.heads % units or not linears:
        return
    (reader,) = attention.outputs
    columns = block.get_submodule(reader).get_parameter("weight").shape[1]
    if columns % units:
        return
    for chosen in product(*(list(_layouts(block, source, attention)) for source in sources)):
        rows = with_vectors(block, dict(zip(sources, chosen, strict=True)))
        rows |= _vectors(block, attention, rows)
        yield CoupledChannels("heads", reader, units, _in_a_row(columns, units), rows)


def _layouts(block: nn.Module, source: str, attention: Attention) -> Iterator[Tensor]:
    rows, units = len(block.get_submodule(source).get_parameter("weight")), attention.key_heads
    of_queries, of_keys = attention.heads * attention.head_width, units * attention.head_width
    roles = [source in names for names in (attention.queries, attention.keys, attention.values)]
    if sum(roles) > 1:
        sections = [size for size, role in zip((of_queries, of_keys), roles, strict=False) if role]
        sections += [rows - sum(sections)] if roles[2] else []
        if sum(sections) == rows and all(size > 0 and size % units == 0 for size in sections):
            yield torch.cat([_in_a_row(size, units) for size in sections])
    if rows % units == 0:
        yield _in_a_row(rows, units)
    yield torch.full((rows,), _STAYS)


def _in_a_row(count: int, units: int) -> Tensor:
    return torch.arange(count) // (count // units)


def with_vectors(block: nn.Module, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of layers with the units of their rows; a layer all of whose rows stay is left out."""
    taken = {name: unit_R for name, unit_R in units.items() if bool((unit_R != _STAYS).any())}
    return {
        f"{name}.{key}": unit_R for name, unit_R in taken.items() for key, _ in block.get_submodule(name).named_parameters(recurse=False)
    }


def _vectors(block: nn.Module, attention: Attention, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an attention itself that have one number for each head, such as sinks."""
    own = block.get_submodule(attention.module).named_parameters(attention.module, recurse=False)
    return {
        name: _in_a_row(attention.heads, attention.key_heads)
        for name, vector in own
        if name not in rows and vector.shape == (attention.heads,)
    }


def _is_linear(block: nn.Module, probe: Probe, name: str) -> bool:
    try:
        part = block.get_submodule(name)
    except AttributeError:
        return False
    reads = [recorded.read for recorded in probe.of(f"{name}.weight")]
    return isinstance(part, nn.Linear) and bool(reads) and all(read.in_dim == 1 and read.out_dim == 0 for read in reads)


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _is_verified(probe: Probe, one: CoupledChannels) -> bool:
    """Return True where the rows of units change the columns of these units, each of them, and nothing else."""
    try:
        for bit in range((one.units - 1).bit_length()):
            for value in (0, 1):
                changed_U = (torch.arange(one.units) >> bit) & 1 == value
                if not torch.equal(_Change(probe, one, changed_U).columns(), changed_U[one.columns_I]):
                    return False
    except Refused:
        return False
    return True


def differs(probe: Probe, one: CoupledChannels, changed_U: Tensor) -> Tensor:
    """Return the columns of the reader that change with these units; raises Refused where something else changes."""
    return _Change(probe, one, changed_U).columns()


@torch.no_grad()
def narrow(block: nn.Module, one: CoupledChannels, unit_K: Tensor, weight_OK: Tensor | None = None) -> None:
    """Keep these units of a block, in order: the rows that make them, and the columns of the reader or the weight that is given."""
    for name in one.rows:
        home, _, key = name.rpartition(".")
        part = block.get_submodule(home)
        before: Tensor = getattr(part, key)
        _put(part, key, before, before[one.rows_of(name, unit_K).to(before.device)])
    reader = block.get_submodule(one.reader)
    weight = reader.get_parameter("weight")
    kept = weight.flatten(1)[:, one.columns_of(unit_K).to(weight.device)] if weight_OK is None else weight_OK.to(weight)
    _put(reader, "weight", weight, kept.unflatten(1, (-1, *weight.shape[2:])) if weight.ndim > 2 else kept)


def _put(part: nn.Module, key: str, before: Tensor, value: Tensor) -> None:
    if isinstance(before, nn.Parameter):
        setattr(part, key, nn.Parameter(value.contiguous(), requires_grad=before.requires_grad))
    else:
        part._buffers[key] = value.contiguous()


class _Change:
    """One run in which the outputs of layers are other numbers in the rows of some units."""

    def __init__(self, probe: Probe, one: CoupledChannels, changed_U: Tensor) -> None:
        self._probe, self._reader = probe, f"{one.reader}.weight"
        self._rows = {name: changed_U[unit_R.clamp(min=0)] & (unit_R != _STAYS) for name, unit_R in one.rows.items()}
        self._columns_I = torch.zeros(probe.parameters[self._reader].shape[1], dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(11)

    def columns(self) -> Tensor:
        """Return the columns of the reader that changed; raises Refused where something else did."""
        if not self._probe.gives(self._probe.run(answer=self._answer)):
            raise Refused("the block's output reads it")
        return self._columns_I

    def _answer(self, read: Read) -> Tensor:
        recorded = self._probe.reads.get(read.key)
        if recorded is None or recorded.x.shape != read.x.shape:
            raise Refused("tokens take another way")
        if not torch.equal(read.x, recorded.x):
            far = (read.x - recorded.x).abs() > _SAME * recorded.x.abs().max()
            if read.name == self._reader:
                self._columns_I |= far.movedim(read.x_dim, -1).flatten(0, -2).any(0)
            elif bool(far.any()):
                raise Refused(f"{read.name} reads it too")
        y = recorded.y.clone()
        rows_R = self._rows.get(read.name)
        if rows_R is not None and read.out_dim is not None:
            first = read.start[read.out_dim]
            turned = y.movedim(read.y_dim, -1)
            noise = torch.randn(turned.shape, generator=self._generator, dtype=y.dtype) * turned.std()
            turned.copy_(torch.where(rows_R[first : first + read.outputs], noise - turned, turned))
        return y


def _of_every_expert(block: nn.Module, one: CoupledChannels) -> Iterator[CoupledChannels]:
    """The channels of the first expert of a list, for each expert of it."""
    lists: dict[str, Any] = {name: part for name, part in block.named_modules() if isinstance(part, ExpertList)}
    home = next((name for name in lists if one.reader.startswith(f"{name}.0.")), None)
    if home is None:
        yield one
        return
    for number in range(len(lists[home])):
        first, other = f"{home}.0.", f"{home}.{number}."
        rows = {name.replace(first, other, 1): unit_R for name, unit_R in one.rows.items()}
        yield replace(one, reader=one.reader.replace(first, other, 1), rows=rows)
