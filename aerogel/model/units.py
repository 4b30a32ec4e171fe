"""Units of reconstruction in a block: one layer, a layer with the norm and the activation behind it, or the whole block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from aerogel.layers.conv import Layer
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.model.block import Block
from aerogel.model.hooks import temporary_hooks


@dataclass(frozen=True)
class Unit:
    """Modules of a block that run one after another, by name in the block, from the one that is fitted on."""

    names: tuple[str, ...]

    @property
    def layer(self) -> str:
        """Name of the layer that is fitted."""
        return self.names[0]

    def module(self, block: Block) -> nn.Sequential:
        """Return its modules in a row; the weight of the layer is `0.weight` in it."""
        return nn.Sequential(*(block.module.get_submodule(name) for name in self.names))

    def ends(self, block: Block) -> tuple[nn.Module, nn.Module]:
        """Return its first and its last module."""
        return block.module.get_submodule(self.names[0]), block.module.get_submodule(self.names[-1])


def captured(block: Block, first: nn.Module | None, last: nn.Module | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Run the block's calls once and return copies, on the host, of every input of `first` and every output of `last`."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    keep = block.network.placement.take_back

    def see_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(keep((args[0] if args else next(iter(kwargs.values()))).detach().clone()))

    def see_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(keep(output.detach().clone()))

    handles = [] if first is None else [first.register_forward_pre_hook(see_input, with_kwargs=True)]
    handles += [] if last is None else [last.register_forward_hook(see_output)]
    with temporary_hooks(handles), cache_dequantized(block.module):
        for call in block.calls:
            block.run(call)
    return inputs, outputs


def routed(block: Block) -> frozenset[str]:
    """Return the names of the modules in routed experts: which tokens they get depends on the weights before them."""
    lists = [name for name, part in block.module.named_modules() if isinstance(part, ExpertList)]
    inside = tuple(f"{name}." for name in lists)
    return frozenset(name for name, _ in block.module.named_modules() if inside and name.startswith(inside))


@dataclass
class _Run:
    """The forwards of one call: which modules without parts of their own ran, on which state of which tensor."""

    forwards: list[tuple[str, Tensor, int, Tensor, int]] = field(default_factory=list)
    """(name, input and its version before, output and its version after)."""
    pending: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def follower(self, name: str) -> str | None:
        """Return the module that runs on what this one gives as it gives it; None where there is none, or several, or it runs twice."""
        (own, *again) = [place for place, forward in enumerate(self.forwards) if forward[0] == name]
        _, _, _, output, version = self.forwards[own]
        readers = [forward[0] for forward in self.forwards if forward[1] is output and forward[2] == version and forward[0] != name]
        return readers[0] if len(readers) == 1 and not again and self._runs(readers[0]) == 1 else None

    def _runs(self, name: str) -> int:
        return sum(forward[0] == name for forward in self.forwards)


def rows_of(block: Block, layers: Collection[str]) -> dict[str, Unit]:
    """Return each layer with the norms and activations that follow as modules, up to the next layer, join or function, as they run.

    A layer that no call of the block reaches is left out.
    """
    parts = {name: part for name, part in block.module.named_modules() if name and not any(True for _ in part.children())}
    rows: dict[str, Unit] = {}
    with cache_dequantized(block.module):
        for call in chain(block.one_row_each or (), block.calls):  # one sample of a call may not reach all experts
            run = _Run()
            with temporary_hooks(list(_watching(parts, run))):
                block.run(call)
            ran = dict.fromkeys(name for name, *_ in run.forwards)
            rows |= {name: Unit(_row(name, run, parts)) for name in ran if name in layers and name not in rows}
            if rows.keys() >= set(layers):
                break
    return rows


def _row(name: str, run: _Run, parts: Mapping[str, nn.Module]) -> tuple[str, ...]:
    row = [name]
    while (then := run.follower(row[-1])) is not None and not isinstance(parts[then], Layer | QuantLinear):
        row.append(then)
    return tuple(row)


def _watching(parts: Mapping[str, nn.Module], run: _Run) -> Iterator[Any]:
    """Put hooks on modules that write down their forwards; one that gives its input back unchanged is passed over."""

    def before(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if len(given) == 1:
                run.pending[name] = (given[0], given[0]._version)

        return see

    def after(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, version = run.pending.pop(name, (None, 0))
            unchanged = output is x and isinstance(output, Tensor) and output._version == version
            if x is not None and isinstance(output, Tensor) and not unchanged:
                run.forwards.append((name, x, version, output, output._version))

        return see

    for name, part in parts.items():
        yield part.register_forward_pre_hook(before(name), with_kwargs=True)
        yield part.register_forward_hook(after(name))
