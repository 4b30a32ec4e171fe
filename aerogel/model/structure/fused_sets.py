"""Fused sets: linear layers that read one input and that engines load as one tensor, found in forwards with placeholder weights.

Every product gives random numbers there, so that two layers have equal inputs only where they read the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from aerogel.layers.conv import QuantConv2d
from aerogel.layers.experts import ExpertList
from aerogel.layers.linear import QuantLinear
from aerogel.model.structure.examples import Example, run
from aerogel.model.structure.placeholders import placeholder_weights

FusedSet = tuple[str, ...]
"""Names of the layers, in the order in which they run."""


def fused_sets_of(module: nn.Module, blocks: Sequence[str], examples: Sequence[Example]) -> dict[str, tuple[FusedSet, ...]]:
    """Find the fused sets of each block, by names in it: query, key and value; gate and up of a feed-forward, and of each expert.

    They are the linear layers of one module that read the same input. Blocks that no example reaches are left out.
    """
    found = list(_reading_together(module, examples))
    sets: dict[str, tuple[FusedSet, ...]] = {}
    for block in blocks:
        start = f"{block}."
        here = [tuple(name.removeprefix(start) for name in names) for names in found if names[0].startswith(start)]
        if here:
            lists = {name: part for name, part in module.get_submodule(block).named_modules() if isinstance(part, ExpertList)}
            inside = tuple(f"{home}." for home in lists)
            apart = [names for names in here if len(names) > 1 and not names[0].startswith(inside)]
            sets[block] = (*apart, *(names for home, experts in lists.items() for names in _of_experts(home, experts)))
    return sets


def _of_experts(home: str, experts: ExpertList) -> Iterator[FusedSet]:
    """Gate and up of every expert: few of them run in an example."""
    if experts.names.gate:
        for number in range(len(experts)):
            yield f"{home}.{number}.{experts.names.gate}", f"{home}.{number}.{experts.names.up}"


def _reading_together(module: nn.Module, examples: Sequence[Example]) -> Iterator[FusedSet]:
    """Yield the linear layers of one module that read the same input, also those that read one alone, in the order in which they run."""
    layers = {
        name for name, part in module.named_modules() if isinstance(part, nn.Linear | QuantLinear) and not isinstance(part, QuantConv2d)
    }
    placed: set[str] = set()
    for example in examples:
        groups: dict[str, list[tuple[Tensor, list[str]]]] = {}

        def see(name: str, x: Tensor, y: Tensor, groups: dict[str, list[tuple[Tensor, list[str]]]] = groups) -> Tensor:
            if name in layers and name not in placed:
                placed.add(name)
                beside = groups.setdefault(name.rpartition(".")[0], [])
                names = next((names for other, names in beside if other.dtype == x.dtype and torch.equal(other, x)), None)
                if names is None:
                    beside.append((x.clone(), [name]))  # which code may change in place
                else:
                    names.append(name)
            return y

        with placeholder_weights(module, see):
            run(module, example)
        yield from (tuple(names) for beside in groups.values() for _, names in beside)
