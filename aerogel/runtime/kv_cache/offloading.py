"""Keys and values in host memory: each layer of a cache is on the device only while its block attends, and the next one on its way.

Which layers a token needs, and when, is known: all of them, in order. So nothing is predicted. On an accelerator copies run beside the
computation, to and from pinned memory; on a CPU they are plain copies, in the same order.

B rows, H heads, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from aerogel.errors import AerogelError
from aerogel.model.hooks import OwnedHook
from aerogel.model.kv_cache import cache_in, cache_layer
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import Decoder
from aerogel.runtime.tokens.shortening import trims

_GROWTH = 256
"""Tokens, at least, by which host memory grows: each time all of it is copied."""


class Event(NamedTuple):
    """Step of the manager."""

    what: Literal["prefetch", "compute", "offload"]
    """A copy to the device was issued; a block is about to attend; a copy to the host was issued."""
    block: int
    """Number of the decoder block."""
    held: int
    """Bytes of keys and values on the device, after a prefetch and before an offload."""


class _Side:
    """A stream beside that of the computation; on a CPU nothing, and copies are done when they are issued."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self.pins = self._stream is not None

    def issue(self, copies: Callable[[], Any]) -> Any:
        """Run copies behind what the computation was given so far; returns an event for their end."""
        if self._stream is None:
            return copies()
        self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
        with self._stream:
            copies()
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation wait for an event."""
        if event is not None and self._stream is not None:
            torch.accelerator.current_stream(self._stream.device).wait_event(event)

    def finish(self) -> None:
        """Wait until everything is done: who reads host memory then finds it complete."""
        if self._stream is not None:
            self._stream.synchronize()


class _Host:
    """Keys and values of one layer in host memory, token by token, so that new ones are one run of bytes."""

    def __init__(self, keys: Tensor, values: Tensor, pins: bool) -> None:
        """Make room for tensors of this shape (B, H, T, D)."""
        self._pins, self.length = pins, 0
        self._data = [self._empty(x, x.shape[2] + _GROWTH) for x in (keys, values)]
        self.views: tuple[Tensor, Tensor] = self._views()

    def append(self, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Make room for more tokens; returns the pairs (where to, what) to copy."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > len(self._data[0]):
            larger = [self._empty(x, self.length + max(_GROWTH, self.length // 4)) for x in self.views]
            for new, old in zip(larger, self._data, strict=True):
                new[:start] = old[:start]
            self._data = larger
        self.views = self._views()
        # Copied on the device first: what is kept until the copy ends is the new tokens, not all of them.
        return [(data[start : self.length], x.permute(2, 0, 1, 3).clone()) for data, x in zip(self._data, (keys, values), strict=True)]

    def fetch(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs (where to, what) that bring it to the device."""
        return [(torch.empty_like(data[: self.length], device=device), data[: self.length]) for data in self._data]

    def _views(self) -> tuple[Tensor, Tensor]:
        keys, values = (data[: self.length].permute(1, 2, 0, 3) for data in self._data)
        return keys, values

    def _empty(self, like: Tensor, tokens: int) -> Tensor:
        rows, heads, _, channels = like.shape
        return torch.empty(tokens, rows, heads, channels, dtype=like.dtype, pin_memory=self._pins)


@dataclass
class _Fetched:
    """Keys and values on the device, or on their way."""

    host: _Host
    data: list[Tensor]
    event: Any

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.data)


class Offloading:
    """Moves the layers of caches between host and device."""

    def __init__(self, network: Network, decoder: Decoder, resident: int = 0, log: Callable[[Event], None] = lambda event: None) -> None:
        """Prepare; the first `resident` blocks keep theirs on the device, and `log` is told every step."""
        self._network, self._decoder, self._resident, self._log = network, decoder, resident, log
        self._hosts: WeakKeyDictionary[Cache, dict[int, _Host]] = WeakKeyDictionary()
        self._side: _Side | None = None
        self._device = torch.device("cpu")
        self._coming: dict[int, _Fetched] = {}
        self._leaving: tuple[list[Tensor], Any] | None = None
        self._active = 0

    @contextmanager
    def on(self) -> Iterator[Offloading]:
        """Act on every forward with a cache for a while; layers that were offloaded stay in host memory."""
        with ExitStack() as stack:
            hook = OwnedHook(self, self._end)
            stack.callback(self._network.module.register_forward_hook(hook, always_call=True).remove)
            for number in range(self._resident, self._decoder.depth):
                module = self._network.module.get_submodule(self._decoder.attentions[number])
                before, after = OwnedHook(self, partial(self._before, number)), OwnedHook(self, partial(self._after, number))
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield self

    def _before(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a block attends: bring its keys and values, and send for those of the next block."""
        cache = cache_in(args, kwargs)
        if cache is None:
            return
        if trims(self._network):
            raise AerogelError("a policy that evicts positions while tokens are written is on; leave one of them out")
        layer = _movable(cache, self._decoder.places[number])
        self._device = kwargs["hidden_states"].device if "hidden_states" in kwargs else args[0].device
        self._side = self._side or _Side(self._device)
        if layer.get_seq_length():
            host = self._host(cache, number, layer)
            coming = self._coming.pop(number, None)
            if coming is not None:
                self._side.wait(coming.event)
            if coming is None or coming.host is not host:
                coming = self._fetch(number, host)
                self._side.wait(coming.event)
            self._active = coming.bytes
            layer.keys, layer.values = (x.permute(1, 2, 0, 3) for x in coming.data)
        if number + 1 < self._decoder.depth:
            later = _movable(cache, self._decoder.places[number + 1])
            if later.get_seq_length():
                self._coming[number + 1] = self._fetch(number + 1, self._host(cache, number + 1, later))
        self._log(Event("compute", number, self._held))

    def _after(self, number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a block has attended: send what is new to the host, and let go of the rest."""
        cache = cache_in(args, kwargs)
        if cache is None or self._side is None:
            return
        layer = cache_layer(cache, self._decoder.places[number])
        self._active = layer.keys.nbytes + layer.values.nbytes
        self._log(Event("offload", number, self._held))
        self._let_go()
        hosts = self._hosts.setdefault(cache, {})
        host = hosts.get(number)
        if host is None or layer.keys.shape[2] < host.length:
            host = hosts[number] = _Host(layer.keys, layer.values, self._side.pins)
        pairs = host.append(layer.keys[:, :, host.length :], layer.values[:, :, host.length :])
        self._leaving = [what for _, what in pairs], self._side.issue(partial(_copy, pairs))
        layer.keys, layer.values = host.views
        self._active = 0
        if number == self._decoder.depth - 1:
            self._side.finish()  # behind the last block others may read what the host holds

    def _host(self, cache: Cache, number: int, layer: Any) -> _Host:
        """The host memory of a layer, anew where somebody has cropped, reordered or cut what the layer holds."""
        assert self._side is not None
        hosts = self._hosts.setdefault(cache, {})
        if number not in hosts or hosts[number].views[0] is not layer.keys:
            hosts[number] = _Host(layer.keys, layer.values, self._side.pins)
            _copy(hosts[number].append(layer.keys, layer.values))
            layer.keys, layer.values = hosts[number].views
        return hosts[number]

    def _fetch(self, number: int, host: _Host) -> _Fetched:
        assert self._side is not None
        pairs = host.fetch(self._device)
        fetched = _Fetched(host, [to for to, _ in pairs], self._side.issue(partial(_copy, pairs)))
        self._log(Event("prefetch", number, self._held + fetched.bytes))
        return fetched

    @property
    def _held(self) -> int:
        leaving = sum(x.nbytes for x in self._leaving[0]) if self._leaving is not None else 0
        return self._active + leaving + sum(one.bytes for one in self._coming.values())

    def _let_go(self) -> None:
        if self._leaving is not None and self._side is not None:
            self._side.wait(self._leaving[1])
        self._leaving = None

    def _end(self, *_: Any) -> None:
        self._let_go()
        self._coming.clear()
        self._active = 0
        if self._side is not None:
            self._side.finish()


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for to, what in pairs:
        to.copy_(what, non_blocking=True)


def _movable(cache: Cache, place: int) -> Any:
    """The layer of a cache; raises AerogelError for a kind that is not moved."""
    layer = cache_layer(cache, place)
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "attend") or getattr(cache, "offloading", False):
        raise AerogelError(
            f"the cache of this call has a {type(layer).__name__}, and keys and values are moved to the host from a dynamic cache in 16 "
            "bits only, that nobody else moves; leave cache_implementation out, and the policy that quantizes the cache"
        )
    return layer
