"""Towers: the lists of blocks that a network runs one after another, found by watching it run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from aerogel.layers.experts import ExpertList
from aerogel.model.calls import tensors_in
from aerogel.model.hooks import temporary_hooks
from aerogel.model.structure.examples import Example, run
from aerogel.model.structure.placeholders import placeholder_weights

_MATRICES = 4
"""Matrices that make a single element of a list a block: attention or an MLP with something beside it."""


@dataclass(frozen=True)
class Tower:
    """A part of a network that has blocks: a language model, a vision encoder, a denoiser."""

    name: str
    """Full name of the list of blocks, for example `model.layers`."""
    blocks: tuple[str, ...]
    """Full names of the blocks, in the order of the list."""


@dataclass
class _Passes:
    """Forwards of one module during an example."""

    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    @property
    def kept_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of inputs that outputs of the first forward have too."""
        return {tuple(tensor.shape) for tensor in self.inputs[0]} & {tuple(tensor.shape) for tensor in self.outputs[0]}

    @property
    def first_input(self) -> tuple[int, tuple[int, ...]] | None:
        """Identity of the first tensor that the module read."""
        first = next(iter(self.inputs[0]), None)
        return None if first is None else (first.data_ptr(), tuple(first.shape))


def towers_of(module: nn.Module, examples: Sequence[Example]) -> tuple[Tower, ...]:
    """Find the towers of a network in forwards with placeholder weights; blocks that no example reaches are known by their lists alone."""
    passes: dict[str, _Passes] = {}
    for example in examples:
        with _watched(module) as seen, placeholder_weights(module):
            run(module, example)
        passes |= {name: passes_ for name, passes_ in seen.items() if name not in passes}
    return _Search(module, passes).towers()


@contextmanager
def _watched(module: nn.Module) -> Iterator[dict[str, _Passes]]:
    """Keep what goes into and comes out of elements of lists; tensors stay alive, so that their addresses stay theirs."""
    passes: dict[str, _Passes] = defaultdict(_Passes)
    handles = []

    def before(name: str) -> Any:
        return lambda _, args, kwargs: passes[name].inputs.append(_matrices((args, kwargs)))

    def after(name: str) -> Any:
        return lambda _, args, kwargs, output: passes[name].outputs.append(_matrices(output))

    parts = dict(_with_matrices(module))
    for name, part in parts.items():
        if not isinstance(parts.get(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential):
            continue
        handles.append(part.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(part.register_forward_hook(after(name), with_kwargs=True))
    with temporary_hooks(handles):
        yield passes


def _matrices(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(tree) if tensor.ndim >= 2 and tensor.is_floating_point()]


def _with_matrices(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules below one that hold a matrix, experts of a list left out: what they read depends on the router."""
    for key, part in module.named_children():
        name = f"{prefix}{key}"
        if _has_matrix(part):
            yield name, part
            if not isinstance(part, ExpertList):
                yield from _with_matrices(part, f"{name}.")


def _matrices_of(part: nn.Module) -> int:
    """Number of matrices that a module has by itself; the buffers of a quantized layer are one, as its weight was."""
    weights = sum(tensor.ndim >= 2 for tensor in part.parameters(recurse=False))
    return weights or int(any(tensor.ndim >= 2 for tensor in part.buffers(recurse=False)))


def _has_matrix(part: nn.Module) -> bool:
    return any(tensor.ndim >= 2 for tensor in (*part.parameters(), *part.buffers()))


class _Search:
    """Search for towers among the lists of a network."""

    def __init__(self, module: nn.Module, passes: Mapping[str, _Passes]) -> None:
        self._parts = dict(_with_matrices(module))
        self._passes = passes
        self._observed = bool(passes)
        self._lists = [name for name, part in self._parts.items() if isinstance(part, nn.ModuleList | nn.Sequential)]

    def towers(self) -> tuple[Tower, ...]:
        """All towers, in the order of the modules."""
        found = self._outermost(self._lists, least=2)
        for name in self._lists:
            blocks = self._blocks(name, least=1)
            inside = tuple(f"{block}." for others in found.values() for block in others)
            if name not in found and blocks and not name.startswith(inside) and self._is_short_tower(name, blocks, found):
                found = {other: value for other, value in found.items() if not other.startswith(f"{name}.")} | {name: blocks}
        return tuple(Tower(name, found[name]) for name in self._lists if name in found)

    def _is_short_tower(self, name: str, blocks: Sequence[str], found: Mapping[str, Sequence[str]]) -> bool:
        """Return True for a list of one such as that in the middle of a UNet, known by its class, or of a model of one layer."""
        kinds = {type(self._parts[block]) for others in found.values() for block in others}
        if all(type(self._parts[block]) in kinds for block in blocks):
            return True
        matrices = sum(_matrices_of(part) for block in blocks for part in self._parts[block].modules())
        alone = isinstance(self._parts[name], nn.ModuleList) and any(block in self._passes for block in blocks)
        return alone and matrices >= _MATRICES and self._passes_on(blocks)

    def _outermost(self, lists: Sequence[str], least: int) -> dict[str, tuple[str, ...]]:
        """Lists whose blocks pass a shape on; where they change it (the levels of a UNet, the stages of a Swin), the lists inside them."""
        found: dict[str, tuple[str, ...]] = {}
        done: list[str] = []
        for name in lists:
            blocks = () if name.startswith(tuple(f"{other}." for other in done)) else self._blocks(name, least)
            if not blocks:
                continue
            done.append(name)
            inner = [other for other in self._lists if other.startswith(tuple(f"{block}." for block in blocks))]
            deeper = any(self._blocks(other, 1) for other in inner)
            if self._passes_on(blocks) or (not deeper and least < 2):
                found[name] = blocks
            elif deeper:
                found |= self._outermost(inner, 1)
        return found

    def _blocks(self, name: str, least: int) -> tuple[str, ...]:
        """The elements of a list that may be blocks; none where they run in no row."""
        part = self._parts[name]
        elements = [f"{name}.{key}" for key, child in part.named_children() if f"{name}.{key}" in self._parts]
        blocks = [element for element in elements if self._may_be_block(element)]
        if isinstance(part, ExpertList) or len(blocks) < max(least, len(elements) / 2):
            return ()
        if isinstance(part, nn.Sequential) and len({type(self._parts[block]) for block in blocks}) > 1:
            return ()
        first = [self._passes[block].first_input for block in blocks if block in self._passes]
        if len(first) > 1 and len(set(first)) == 1:
            return ()  # all read the same tensor: experts, or heads
        return tuple(blocks)

    def _may_be_block(self, name: str) -> bool:
        part = self._parts[name]
        if not any(True for _ in part.children()) or isinstance(part, nn.ModuleList):
            return False
        return not self._observed or (name in self._passes and len(self._passes[name].outputs) == 1)

    def _passes_on(self, blocks: Sequence[str]) -> bool:
        seen = [self._passes[block].kept_shapes for block in blocks if block in self._passes]
        if not seen:
            # Nothing was observed: levels of a UNet have other shapes each, blocks the same.
            kinds = Counter(tuple(tensor.shape for tensor in self._parts[block].parameters()) for block in blocks)
            return 2 * kinds.most_common(1)[0][1] >= len(blocks)
        return bool(set.intersection(*seen))
