"""Attention in a block: which layers make queries, keys and values, which read what comes out, and how heads lie.

Found by watching a run in which every product with a parameter starts a graph anew: what queries depend on are then the layers that made
them, with whatever norm or rotary embedding between. Attention by `scaled_dot_product_attention` is seen, and attention that is written
out as a product, a softmax and another product.

Letters in names: N rows, H heads, T tokens, S tokens attended to, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aerogel.model.hooks import temporary_hooks
from aerogel.model.structure.observer import Read
from aerogel.model.structure.probe import Probe

_SOFTMAX = {torch.softmax, functional.softmax, Tensor.softmax}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


@dataclass(frozen=True)
class Attention:
    """One attention of a block, by names in the block."""

    module: str
    """Module that attends."""
    queries: tuple[str, ...]
    """Layers that queries are made by; a fused layer is among those of keys and values too."""
    keys: tuple[str, ...]
    values: tuple[str, ...]
    outputs: tuple[str, ...]
    """Layers that read what comes out."""
    heads: int
    key_heads: int
    """Heads of keys and values, each for `heads / key_heads` heads of queries."""
    head_width: int
    """Width of a head of queries and keys."""


@dataclass
class _Seen:
    """Tensors of one attention, with a graph back to the layers that made them."""

    module: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@torch.enable_grad()
def attentions_in(block: nn.Module, probe: Probe) -> list[Attention]:
    """Find the attentions of a block, in the order in which they run, each once; none where it attends in other ways."""
    made: dict[str, list[Tensor]] = {}
    read: list[tuple[str, Tensor]] = []

    def answer(product: Read) -> Tensor:
        read.append((_layer(product.name), product.x))
        y = probe.reads[product.key].y.clone().requires_grad_()
        made.setdefault(_layer(product.name), []).append(y)
        return y * 1  # the model's code may add to it in place

    try:
        with _running(block) as running, _Watch(running) as watch:
            probe.run(answer=answer)
    except Exception:  # noqa: BLE001  code that changes a tensor of a graph in place, or attention without gradients
        return []
    leaves = [(name, leaf) for name, of_layer in made.items() for leaf in of_layer]
    return list(dict.fromkeys(_described(seen, leaves, read) for seen in watch.seen))


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _described(seen: _Seen, leaves: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> Attention:
    readers = dict.fromkeys(name for name, x in read if x.requires_grad and _depends(x, [seen.output])[0])
    queries, keys, values = (
        tuple(dict.fromkeys(name for (name, _), hit in zip(leaves, _depends(tensor, [leaf for _, leaf in leaves]), strict=True) if hit))
        for tensor in (seen.query, seen.key, seen.value)
    )
    heads = seen.query.shape[-3]
    return Attention(seen.module, queries, keys, values, tuple(readers), heads, _distinct(seen.key), seen.query.shape[-1])


def _depends(tensor: Tensor, leaves: Sequence[Tensor]) -> list[bool]:
    """Return for each of the leaves whether the tensor depends on it."""
    if not tensor.requires_grad:
        return [False] * len(leaves)
    slopes = torch.autograd.grad(tensor.square().sum(), leaves, retain_graph=True, allow_unused=True)
    return [slope is not None and bool(slope.any()) for slope in slopes]


def _distinct(key_NHSD: Tensor) -> int:
    """Heads that are not the same as the one before, which they are a copy of where several heads of queries share one."""
    heads = key_NHSD.detach().movedim(-3, 0)
    return 1 + sum(not torch.equal(one, other) for one, other in zip(heads[1:], heads[:-1], strict=True))


@contextmanager
def _running(block: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are running, the innermost last."""
    running: list[str] = [""]

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    handles = []
    for name, part in block.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(enter(name)))
            handles.append(part.register_forward_hook(lambda *_: running.pop() and None))
    with temporary_hooks(handles):
        yield running


class _Watch(TorchFunctionMode):
    """Sees what attends."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.seen: list[_Seen] = []
        self._running = running
        self._products: list[tuple[Tensor, Tensor]] = []
        self._scores: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return self._add(given["query"], given["key"], given["value"], result)
        if func in _SOFTMAX:
            self._scores = self._products[-1] if self._products and result.ndim >= 3 else None
            self._products.clear()
        elif func in _MATMUL and len(args) == 2 and all(isinstance(one, Tensor) and one.ndim >= 3 and one.requires_grad for one in args):
            if self._scores is not None:
                (query, key), self._scores = self._scores, None
                return self._add(query, key.transpose(-1, -2), args[1], result)
            self._products.append(args)
        return result

    def _add(self, query: Tensor, key: Tensor, value: Tensor, result: Tensor) -> Tensor:
        output = result.detach().requires_grad_()
        self.seen.append(_Seen(self._running[-1], query, key, value, output))
        return output * 1
