"""A policy that keeps state serves one forward at a time: a second thread gets an error, the first its own answer; nothing leaks."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.layers.forward_guard import ForwardGuard
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model.calls import Call
from aerogel.model.hooks import Stop, until
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.expert_skipping.routing import Routed, Skipping, skipping
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.schedule import Schedule, caching
from aerogel.runtime.token_types import Vocabulary
from tests.tiny import FAMILIES, opened, output

STEPS = (900.0, 600.0, 300.0)


def _all(routed: Routed) -> Tensor:
    return torch.ones_like(routed.index_TK, dtype=torch.bool)


def _skipped(network: Network) -> AbstractContextManager[Any]:
    return skipping(network, Skipping(_all, Vocabulary.of(network)))


def _counted(network: Network) -> AbstractContextManager[Any]:
    return counting(network, Vocabulary.of(network))


def _cached(network: Network) -> AbstractContextManager[Any]:
    modules = tuple(cached_modules_of(network))
    return caching(network, Schedule(STEPS, "", modules, torch.tensor([[True] * len(modules), *[[False] * len(modules)] * 2])))


def _indexed(network: Network) -> AbstractContextManager[Any]:
    return TimestepIndex(STEPS).on(network.module)


POLICIES: dict[str, tuple[str, Callable[[Network], AbstractContextManager[Any]]]] = {
    "expert skipping": ("qwen3_moe", _skipped),
    "counting": ("qwen3_moe", _counted),
    "feature cache": ("dit", _cached),
    "time step index": ("dit", _indexed),
}


def _calls(name: str) -> list[Call]:
    """Calls of different content; those of a denoiser are one generation."""
    found = FAMILIES[name].calls(3)
    if name != "dit":
        return found
    return [Call((), call.kwargs | {"timestep": torch.full((2,), int(step))}) for call, step in zip(found, STEPS, strict=True)]


@contextmanager
def _held_up(network: Network) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Let the first forward that comes wait before its first block: (it is there, let it go on)."""
    there, go = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if not there.is_set():
            there.set()
            assert go.wait(60)

    handle = next(iter(network.blocks().values())).register_forward_pre_hook(wait)
    try:
        yield there, go
    finally:
        go.set()
        handle.remove()


@pytest.mark.parametrize("kind", POLICIES)
def test_a_second_thread_gets_an_error_and_the_first_its_answer(kind: str) -> None:
    name, on = POLICIES[kind]
    network, (first, second, _) = opened(name), _calls(name)
    with on(network):
        wanted = output(network.module, first)
    with on(network), _held_up(network) as (there, go), ThreadPoolExecutor(1) as pool:
        made = pool.submit(output, network.module, first)
        assert there.wait(60)
        with pytest.raises(AerogelError, match="serves one forward at a time"):
            output(network.module, second)
        go.set()
        assert torch.equal(made.result(60), wanted)


def test_a_run_goes_on_in_its_own_thread_only() -> None:
    network, (first, second, third) = opened("dit"), _calls("dit")
    with _cached(network):
        wanted = [output(network.module, call) for call in (first, second, third)]
    with _cached(network), ThreadPoolExecutor(1) as pool:
        output(network.module, first)
        made = [pool.submit(output, network.module, first).result(60)]  # begins a run of its own
        with pytest.raises(AerogelError, match="which serves one run at a time"):
            output(network.module, second)
        made += [pool.submit(output, network.module, call).result(60) for call in (second, third)]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("kind", ["expert skipping", "counting"])
def test_kinds_of_tokens_do_not_outlive_their_forward(kind: str) -> None:
    network, (_, padded, _) = opened("qwen3_moe"), _calls("qwen3_moe")
    inner: nn.Module = network.module.model  # type: ignore[assignment]
    assert (padded.kwargs["attention_mask"] == 0).any()
    with POLICIES[kind][1](network):
        output(network.module, padded)
        with pytest.raises(AerogelError, match="outside of the model's own forward"):
            inner(input_ids=padded.kwargs["input_ids"], use_cache=False)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_forward_that_was_given_up_holds_nothing(kind: str) -> None:
    name, on = POLICIES[kind]
    network, first, stop = open_model(FAMILIES[name].build()), _calls(name)[0], Stop()

    def give_up(*_: Any) -> None:
        raise stop

    with on(network), ThreadPoolExecutor(1) as pool:
        handle = next(iter(network.blocks().values())).register_forward_pre_hook(give_up)
        with until(stop):
            output(network.module, first)
        handle.remove()
        pool.submit(output, network.module, first).result(60)


def test_a_copy_is_held_by_nobody() -> None:
    guard = ForwardGuard()
    guard.enter(nn.Identity())
    assert not copy.deepcopy(guard).leave()
    assert not pickle.loads(pickle.dumps(guard)).leave()
    assert guard.leave()
    assert not guard.leave()
