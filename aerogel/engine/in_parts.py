"""Networks whose weights several processes hold in parts, for steps that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from aerogel.methods.base import RuntimePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.placement import HOST, Placement, move
from aerogel.model.walk import InMemory, Residency
from aerogel.training.distributed import group_size
from aerogel.training.sharded import sharded


def wants_parts(policy: RuntimePolicy[Any]) -> bool:
    """Return True where there are several processes and the policy asks that each holds a part of the weights."""
    return policy.shards_weights and group_size() > 1


@contextmanager
def in_parts(network: Network, call: Call, residency: Residency | None = None) -> Iterator[None]:
    """Hold what is around a network's blocks and this process's part of them on the computing device for a while.

    `residency` brings blocks in where the network is not in memory; one that is there on the device rests on the host meanwhile.
    """
    blocks = network.blocks()
    with _resting_on_host(network), network.glue_on_device():
        residency = residency or InMemory(network)
        try:
            with sharded(network.module, blocks, network.device, residency.enter, partial(network.run, call)):
                yield
        finally:
            for name in blocks:
                residency.release(name)


@contextmanager
def _resting_on_host(network: Network) -> Iterator[None]:
    placed, place = network.placed, network.placement
    if network.checkpoint is not None or place.moves_weights or not place.on_accelerator:
        yield
        return
    try:
        network.placed = Placement(place.device, HOST)
        move(network.module, HOST)
        yield
    finally:
        move(network.module, place.device)
        network.placed = placed
