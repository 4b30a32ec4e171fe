"""Key-value caches of transformers: the modules that write to one, and hooks by which other cache layers take the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Cache

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.hooks import CacheOnlyHook
from aerogel.model.network import Network

Replace = Callable[[Any], Any]
"""A function from a layer of a cache to the one that is used instead, which may be the same."""
See = Callable[[Tensor, Tensor], None]
"""A function that is called with new keys and values, (B, H, T, D) each, D of its own for either."""


class CacheHook(CacheOnlyHook):
    """Forward pre-hook of an attention: replaces its layer of the cache that comes with the call, if one comes."""

    def __init__(self, index: int, replace: Replace) -> None:
        super().__init__(None, self._put)
        self.index, self.replace = index, replace

    def _put(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the other layer in place; the arguments stay as they are."""
        cache = cache_in(args, kwargs)
        if cache is not None:
            cache.layers[self.index] = self.replace(cache_layer(cache, self.index))


def cache_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """Return the cache that comes with a call, if one comes."""
    return next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)


def cache_layer(cache: Cache | None, index: int) -> Any:
    """Return a layer of a cache, made now where the cache makes its layers as they are used; None without a cache."""
    if cache is None:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def bytes_per_token(cache: Any, rows: int) -> float:
    """Return the bytes that a cache of so many rows holds for a token of one row, over all layers: as stored."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "update") and layer.get_seq_length()]
    sizes = [layer.bytes if hasattr(layer, "bytes") else layer.keys.nbytes + layer.values.nbytes for layer in layers]
    return sum(size / layer.get_seq_length() for size, layer in zip(sizes, layers, strict=True)) / rows


def places(network: Network) -> dict[str, int]:
    """Return the modules that have a place in a cache, whether or not they write to it, by full name."""
    found = {name: getattr(module, "layer_idx", None) for name, module in network.module.named_modules()}
    return {name: index for name, index in found.items() if isinstance(index, int)}


def require_places(network: Network) -> None:
    """Raise AerogelError where no module has a place in a cache."""
    if not places(network):
        raise AerogelError(f"no module of this {network.family.name} model has a place in a key-value cache; leave this step out")


class CachedAttention(NamedTuple):
    """Place of a module in a cache, and what it writes there."""

    place: int
    channels: frozenset[int]
    """Widths of its heads of keys and of values."""


def cache_modules(network: Network, call: Call) -> dict[str, CachedAttention]:
    """Return the modules that write keys and values to a cache in a forward of `call`, by full name in the order of the cache.

    Raises AerogelError where there is none.
    """
    writers: dict[int, tuple[str, frozenset[int]]] = {}

    def watch(name: str, index: int) -> Replace:
        def seen(keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
            writers[index] = name, frozenset({keys_BHTD.shape[-1], values_BHTD.shape[-1]})

        return partial(_watched, seen)  # a block that gets the cache and hands it on has the same place: the innermost comes last and stays

    with _hooked(network, {name: (index, watch(name, index)) for name, index in places(network).items()}):
        network.run(with_cache(call))
    if not writers:
        raise AerogelError(
            f"no module of this {network.family.name} model writes keys and values to a cache that it is given; "
            "a decoder of transformers with a DynamicCache is expected: leave this step out"
        )
    return {name: CachedAttention(index, channels) for index, (name, channels) in sorted(writers.items())}


@contextmanager
def cache_layers(network: Network, modules: Mapping[str, int], replace: Callable[[str], Replace]) -> Iterator[None]:
    """Let `replace(name)` choose the cache layer of each module, here by name with its place, in every call that has a cache."""
    with _hooked(network, {name: (index, replace(name)) for name, index in modules.items()}):
        yield


@contextmanager
def watch_cache(network: Network, modules: Mapping[str, int], see: Callable[[str], See]) -> Iterator[None]:
    """Call `see(name)` with the keys and values that each module writes."""
    with cache_layers(network, modules, lambda name: partial(_watched, see(name))):
        yield


def with_cache(call: Call) -> Call:
    """Return the same call with a cache of its own."""
    return Call(call.args, {**call.kwargs, "use_cache": True})


def hooks_of(module: nn.Module) -> list[CacheHook]:
    """Return the hooks of this kind on a module."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, CacheHook)]


def replaces_layers(network: Network) -> bool:
    """Return True if a policy replaces layers of the network's caches."""
    return any(hooks_of(module) for module in network.module.modules())


def _watched(see: See, layer: Any) -> Any:
    """Have keys and values of a layer seen as they come; layers of linear attention keep none."""
    if (own := getattr(type(layer), "update", None)) is None:
        return layer

    def update(keys_BHTD: Tensor, values_BHTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        see(keys_BHTD, values_BHTD)
        return own(layer, keys_BHTD, values_BHTD, *args, **kwargs)

    layer.update = update
    return layer


@contextmanager
def _hooked(network: Network, replacing: Mapping[str, tuple[int, Replace]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, (index, replace) in replacing.items():
            hook = CacheHook(index, replace)
            # First of all hooks: those that drop tokens act on the layer that is used.
            handle = network.module.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield
