"""One traced forward: the order in which blocks run, and which blocks' outputs each later block is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer
from aerogel.layers.linear import QuantLinear
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network
from aerogel.model.shared_entries import Watched, mappings_in

NON_BLOCK = ""
"""The name under which the network around its blocks stands in a route."""


@dataclass(frozen=True)
class Route:
    """The way that calls take through the blocks of a network."""

    order: tuple[str, ...]
    needs: Mapping[str, frozenset[str]]
    """For each block, and for what is around the blocks, those whose outputs it is computed from."""

    def needed_after(self, position: int) -> set[str]:
        """The blocks up to and including `position` whose outputs somebody later reads."""
        done = set(self.order[: position + 1])
        return {name for later in (*self.order[position + 1 :], NON_BLOCK) for name in self.needs[later] & done}


def trace(network: Network, calls: Sequence[Call], visiting: Callable[[str], AbstractContextManager[None]]) -> Route:
    """Run one call of every shape and note the route; `visiting(block)` is entered while a block runs.

    Raises AerogelError when a block runs twice in a call, or when calls of different shapes run blocks in different order.
    """
    routes = [_trace_one(network, call, visiting) for call in {call.shape: call for call in reversed(calls)}.values()]
    order: list[str] = []
    for route in sorted(routes, key=lambda route: -len(route.order)):
        _put_among(order, route.order)
    needs = {name: frozenset().union(*(route.needs.get(name, frozenset()) for route in routes)) for name in (*order, NON_BLOCK)}
    return Route(tuple(order), needs)


def _put_among(order: list[str], others: Sequence[str]) -> None:
    """Add the blocks of a route to an order that does not have them yet, each behind the one that runs before it."""
    place = 0
    for name in others:
        if name not in order:
            order.insert(place, name)
        elif order.index(name) < place:
            raise AerogelError(
                f"calls of different shapes run the blocks in different order ({tuple(order)} and {tuple(others)}); "
                "calibrate with calls of one shape"
            )
        place = order.index(name) + 1


def _trace_one(network: Network, call: Call, visiting: Callable[[str], AbstractContextManager[None]]) -> Route:
    blocks = network.blocks()
    sources = _Sources()
    order: list[str] = []
    needs: dict[str, frozenset[str]] = {}

    def forward_of(name: str, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in needs:
                raise AerogelError(f"block {name} runs twice in one call; the walk visits each block once")
            order.append(name)
            shared = [dict(mapping) for mapping in mappings_in(args, kwargs).values()]
            needs[name] = sources.of((args, kwargs, shared))
            with sources.paused(), visiting(name), Watched(args, kwargs) as watched:
                output = own(*args, **kwargs)
            sources.mark((output, watched.written), frozenset({name}))
            return output

        return forward

    inside = tuple(f"{name}." for name in blocks)
    around = [m for name, m in network.module.named_modules() if isinstance(m, Layer | QuantLinear) and not name.startswith(inside)]
    read_around: set[str] = set()
    handles = [linear.register_forward_pre_hook(lambda _, args: read_around.update(sources.of(args))) for linear in around]
    try:
        with patch_forward({module: forward_of(name, module) for name, module in blocks.items()}), sources:
            network.run(call)
    finally:
        for handle in handles:
            handle.remove()
    return Route(tuple(order), {**needs, NON_BLOCK: frozenset(read_around)})


class _Sources(TorchFunctionMode):
    """Follows, through every torch operation outside the blocks, which blocks a tensor was made from."""

    def __init__(self) -> None:
        super().__init__()
        self._made_from: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._inside = False

    def of(self, tree: Any) -> frozenset[str]:
        return frozenset().union(*(self._made_from.get(tensor, frozenset()) for tensor in tensors_in(tree)))

    def mark(self, tree: Any, names: Iterable[str]) -> None:
        for tensor in tensors_in(tree):
            self._made_from[tensor] = self._made_from.get(tensor, frozenset()) | frozenset(names)

    def paused(self) -> _Paused:
        return _Paused(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside and (names := self.of((args, kwargs))):
            self.mark(result, names)
            if func is torch.Tensor.__setitem__:
                self.mark(args[0], names)
        return result


class _Paused:
    """Stops following while a block runs: what happens inside it is not part of the route."""

    def __init__(self, sources: _Sources) -> None:
        self._sources = sources

    def __enter__(self) -> None:
        self._sources._inside = True

    def __exit__(self, *_: object) -> None:
        self._sources._inside = False
