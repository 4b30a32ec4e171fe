"""Permutation of channels between layers: rows of those that give them, columns of those that read them; the block computes the same.

Legend: I columns of the layers that read the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from aerogel.model.block import Block
from aerogel.model.calls import Call, tensors_in
from aerogel.model.edges import Edge
from aerogel.model.hooks import temporary_hooks

_ALIKE = 0.03
"""Relative difference up to which outputs are the same: another order of the channels differs by more than their size."""


def movable(block: Block, edge: Edge) -> tuple[str, ...]:
    """Return the layers whose rows have to be permuted together to permute the columns of an edge's sinks; none where that does not work.

    These are the source by itself, or with one layer beside it whose rows meet its own element by element, such as the gate of an MLP.
    What is found was tried on a call of the block, with random permutations.
    """
    if not _one_row_each(block, edge):
        return ()
    return block.processes.of_first(lambda: _found(block, edge))


def _one_row_each(block: Block, edge: Edge) -> bool:
    parts = [block.module.get_submodule(name) for name in (*edge.sources, *edge.sinks)]
    fed = bool((edge.rows_I >= 0).all()) and len(edge.rows_I.unique()) == len(edge.rows_I) and edge.added_I is None
    return len(edge.sources) == 1 and fed and all(isinstance(part, nn.Linear) for part in parts)


def _found(block: Block, edge: Edge) -> tuple[str, ...]:
    call = next(iter(block.calls), None)
    if call is None:
        return ()
    (source,) = edge.sources
    before = _outputs(block, edge, call)
    return next((layers for layers in _candidates(block, edge, source) if _same(block, edge, layers, call, before)), ())


def _candidates(block: Block, edge: Edge, source: str) -> Iterator[tuple[str, ...]]:
    """The source alone, and with each layer beside it that has as many rows."""
    yield (source,)
    home, _, _ = source.rpartition(".")
    rows = block.module.get_parameter(f"{source}.weight").shape[0]
    for name, part in block.module.named_modules():
        beside = isinstance(part, nn.Linear) and name.rpartition(".")[0] == home and part.out_features == rows
        if beside and name != source and name not in edge.sinks:
            yield source, name


@torch.no_grad()
def _same(block: Block, edge: Edge, layers: Sequence[str], call: Call, before: Sequence[Tensor]) -> bool:
    order_I = torch.randperm(len(edge.rows_I), generator=torch.Generator().manual_seed(0))
    permute(block.module, edge, layers, order_I)
    try:
        after = _outputs(block, edge, call)
    finally:
        permute(block.module, edge, layers, order_I.argsort())
    pairs = list(zip(before, after, strict=True)) if len(before) == len(after) else []
    return bool(pairs) and all(float((new - old).norm()) <= _ALIKE * float(old.norm()) for old, new in pairs)


def _outputs(block: Block, edge: Edge, call: Call) -> list[Tensor]:
    """Outputs of the sinks, without which the residual stream would hide a difference, and of the block; none where a sink does not run."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        seen[name] = output.detach().double()

    handles = [
        block.module.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: keep(name, output)) for name in edge.sinks
    ]
    with temporary_hooks(handles):
        given = block.run(call)
    return [*seen.values(), *(tensor.double() for tensor in tensors_in(given))] if len(seen) == len(edge.sinks) else []


@torch.no_grad()
def permute(module: nn.Module, edge: Edge, layers: Sequence[str], order_I: Tensor) -> None:
    """Put the channels of an edge into another order, in place: column k becomes what column order_I[k] was, and rows go with it."""
    for name in layers:
        layer = module.get_submodule(name)
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(rows_moved(parameter, edge, order_I))
    for name in edge.sinks:
        weight: Tensor = module.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(weight[:, order_I.to(weight.device)])


def rows_moved(x: Tensor, edge: Edge, order_I: Tensor) -> Tensor:
    """Return something with a row for each row of the source in the order that `permute` gives these."""
    rows_I = edge.rows_I.to(x.device)
    moved = x.clone()
    moved[rows_I] = x[rows_I[order_I.to(x.device)]]
    return moved
