"""Reuse of modules by a table: nothing changes where all runs, exactly the modules that were asked for run, streams and runs stay apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.kernels import synchronized_clock
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, costs_of, seconds_of
from aerogel.runtime.feature_cache.schedule import Schedule, cache_bytes, caching, schedule_state
from tests.clocks import Ticks
from tests.tiny import FAMILIES, opened, output

NAMES = ["dit", "pixart", "wan", "unet", "sd3", "flux", "cogvideox"]
STEPS = (900.0, 600.0, 300.0, 0.0)


def calls(name: str, seed: int = 0, steps: Sequence[float] = STEPS) -> list[Call]:
    """One generation: all samples of a call are at one step."""
    given = FAMILIES[name].calls(len(steps) + seed)[seed:]
    return [
        Call((), call.kwargs | {"timestep": torch.full_like(call.kwargs["timestep"], int(step))})
        for call, step in zip(given, steps, strict=True)
    ]


def table(network: Network, computed_TN: Tensor, steps: Sequence[float] = STEPS) -> Schedule:
    return Schedule(tuple(steps), "DDIMScheduler", tuple(cached_modules_of(network)), computed_TN)


def everything(network: Network) -> Tensor:
    return torch.ones(len(STEPS), len(cached_modules_of(network)), dtype=torch.bool)


def scattered(network: Network) -> Tensor:
    torch.manual_seed(3)
    computed_TN = torch.rand(len(STEPS), len(cached_modules_of(network))) > 0.5
    computed_TN[0] = True
    return computed_TN


@contextmanager
def counted(network: Network) -> Iterator[list[str]]:
    """The modules whose own forward ran."""
    ran: list[str] = []
    find = network.module.get_submodule
    hooks = []
    for name, module in cached_modules_of(network).items():
        inside = [m for part in (name, *module.parts) for m in list(find(part).modules())[1:]]
        first = next(m for m in inside if isinstance(m, nn.Linear))
        hooks.append(first.register_forward_hook(lambda *_, name=name: ran.append(name)))
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def literal(network: Network, given: Sequence[Call], computed_TN: Tensor) -> list[Tensor]:
    """Hooks that replace outputs: every module runs, and what it gives is thrown away where the table reuses."""
    kept: dict[str, Any] = {}
    answers, row = [], 0

    def replace(name: str, place: int) -> Any:
        def hook(_: nn.Module, __: Any, made: Any) -> Any:
            if bool(computed_TN[row, place]) or name not in kept:
                kept[name] = made
            return kept[name]

        return hook

    hooks = [
        network.module.get_submodule(name).register_forward_hook(replace(name, place))
        for place, name in enumerate(cached_modules_of(network))
    ]
    for call in given:
        answers.append(output(network.module, call))
        row += 1
    for hook in hooks:
        hook.remove()
    return answers


@pytest.mark.parametrize("name", NAMES)
def test_where_all_units_run_nothing_changes(name: str) -> None:
    network = opened(name)
    wanted = [output(network.module, call) for call in calls(name)]
    with caching(network, table(network, everything(network))) as reuse:
        given = [output(network.module, call) for call in calls(name)]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert reuse.peak_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_table_answers_like_hooks_that_throw_outputs_away(name: str) -> None:
    network = opened(name)
    computed_TN = scattered(network)
    wanted = literal(network, calls(name), computed_TN)
    with counted(network) as ran, caching(network, table(network, computed_TN)) as reuse:
        given = [output(network.module, call) for call in calls(name)]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert len(set(ran)) == len(cached_modules_of(network))
    assert len(ran) == int(computed_TN.sum()) == reuse.computed


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_computes_whatever_the_table_says(name: str) -> None:
    network = opened(name)
    nothing_TN = torch.zeros_like(everything(network))
    with counted(network) as ran, caching(network, table(network, nothing_TN)):
        given = [output(network.module, call) for call in calls(name)]
    assert sorted(ran) == sorted(cached_modules_of(network))
    assert all(answer.isfinite().all() for answer in given)


@pytest.mark.parametrize("name", NAMES)
def test_norms_that_nobody_reads_get_no_tokens(name: str) -> None:
    network = opened(name)
    computed_TN = everything(network)
    computed_TN[2] = False
    norms = [norm for module in cached_modules_of(network).values() for norm in (*module.norms, *module.parts)]
    assert norms
    seen: list[int] = []
    hooks = [network.module.get_submodule(norm).register_forward_hook(lambda *given: seen.append(given[2].numel())) for norm in norms]
    with caching(network, table(network, computed_TN)):
        for row, call in enumerate(calls(name)):
            seen.clear()
            output(network.module, call)
            assert len(seen) >= len(norms)
            assert max(seen) == 0 if row == 2 else min(seen) > 0
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_a_norm_that_two_units_read_runs_for_either(first: bool, second: bool) -> None:
    network = opened("sd3")
    modules = list(cached_modules_of(network))
    assert [name.rpartition(".")[2] for name in modules[:2]] == ["attn", "attn2"]
    computed_TN = everything(network)
    computed_TN[1, 0], computed_TN[1, 1] = first, second
    wanted = literal(network, calls("sd3"), computed_TN)
    seen: list[int] = []
    network.module.get_submodule("transformer_blocks.0.norm1.norm").register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    with caching(network, table(network, computed_TN)):
        given = [output(network.module, call) for call in calls("sd3")]
    assert seen == [16, 16 if first or second else 0, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_on_comes_off(name: str) -> None:
    network = opened(name)
    before = {part: dict(module.__dict__) for part, module in network.module.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.module.modules()]
    wanted = [output(network.module, call) for call in calls(name)]
    with pytest.raises(AerogelError, match="at different"), caching(network, table(network, scattered(network))):
        _leave(network, name)
    assert {part: module.__dict__.keys() for part, module in network.module.named_modules()} == {
        part: kept.keys() for part, kept in before.items()
    }
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.module.modules()]
    assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls(name), wanted, strict=True))


def _leave(network: Network, name: str) -> None:
    output(network.module, calls(name)[0])
    raise AerogelError("somebody is at different work")


def test_runs_do_not_see_each_other() -> None:
    network = opened("dit")
    schedule = table(network, scattered(network))
    alone = []
    for seed in (0, 4):
        with caching(network, schedule):
            alone.append([output(network.module, call) for call in calls("dit", seed)])
    one = [Call((), {key: value[:1] for key, value in call.kwargs.items()}) for call in calls("dit")]
    with caching(network, schedule):
        for seed, wanted in zip((0, 4, 0), [*alone, alone[0]], strict=True):
            assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit", seed), wanted, strict=True))
            for call in one[:2]:  # a smaller batch, given up half-way
                output(network.module, call)


def test_a_failure_inside_a_run_leaves_nothing_behind() -> None:
    network = opened("dit")
    schedule = table(network, scattered(network))
    with caching(network, schedule):
        wanted = [output(network.module, call) for call in calls("dit")]
        output(network.module, calls("dit", 4)[0])
        broken = Call((), calls("dit", 4)[1].kwargs | {"class_labels": torch.tensor([10**6, 0])})
        with pytest.raises((IndexError, RuntimeError)):
            output(network.module, broken)
        assert all(torch.equal(output(network.module, call), a) for call, a in zip(calls("dit"), wanted, strict=True))


def test_branches_of_guidance_in_calls_of_their_own_answer_like_one_batch() -> None:
    network = opened("dit")
    schedule = table(network, scattered(network))
    with caching(network, schedule):
        together = [output(network.module, call) for call in calls("dit")]
    with caching(network, schedule) as reuse:
        for call, wanted in zip(calls("dit"), together, strict=True):
            for place in range(2):
                part = output(network.module, Call((), {key: value[place : place + 1] for key, value in call.kwargs.items()}))
                torch.testing.assert_close(part, wanted[place : place + 1], rtol=1e-4, atol=1e-5)
    assert reuse.forwards == 2 * len(STEPS)


def test_branches_that_the_pipeline_names_are_told_apart() -> None:
    network = opened("wan")
    schedule = table(network, scattered(network))
    alone = []
    for seed in (0, 4):
        with caching(network, schedule):
            alone.append([output(network.module, call) for call in calls("wan", seed)])
    with caching(network, schedule):
        for step, pair in enumerate(zip(calls("wan"), calls("wan", 4), strict=True)):
            for branch, call in enumerate(pair):
                with network.module.cache_context(f"branch of {branch}"):
                    assert torch.equal(output(network.module, call), alone[branch][step])
    assert "cache_context" not in network.module.__dict__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((900.0, 500.0), r"time step 500 is not the 600 that comes at step 2 of the 4 of DDIMScheduler .900 to 0. that this cache"),
        ((500.0,), "500 is not the 900 that comes at step 1 of the 4"),
        ((600.0, 0.0), "0 is not the 300 that comes at step 3 of the 4"),
        ((*STEPS, 300.0, 600.0), "600 is not the 0 that comes at step 4 of the 4"),
    ],
)
def test_other_steps_are_refused(given: tuple[float, ...], message: str) -> None:
    network = opened("dit")
    *good, bad = calls("dit", steps=given)
    with caching(network, table(network, scattered(network))):
        for call in good:
            output(network.module, call)
        with pytest.raises(AerogelError, match=message):
            output(network.module, bad)


def test_samples_at_different_steps_are_refused() -> None:
    network = opened("dit")
    call = Call((), calls("dit")[0].kwargs | {"timestep": torch.tensor([900, 600])})
    with (
        caching(network, table(network, scattered(network))),
        pytest.raises(AerogelError, match="2 different time steps: a cache needs all samples"),
    ):
        output(network.module, call)


@pytest.mark.parametrize("name", NAMES)
def test_slots_hold_what_the_formula_says(name: str) -> None:
    network = opened(name)
    schedule = table(network, scattered(network))
    with caching(network, schedule) as reuse:
        for call in calls(name):
            output(network.module, call)
    assert reuse.peak_bytes == cache_bytes(schedule, costs_of(network, calls(name)[0]).module_bytes) > 0


def test_slots_of_units_that_are_never_reused_hold_nothing() -> None:
    network = opened("dit")
    computed_TN = everything(network)
    computed_TN[1, 0] = False
    schedule = table(network, computed_TN)
    sizes = costs_of(network, calls("dit")[0]).module_bytes
    with caching(network, schedule) as reuse:
        for call in calls("dit"):
            output(network.module, call)
    assert reuse.peak_bytes == sizes[0] == cache_bytes(schedule, sizes)


def test_costs_are_those_of_the_formula() -> None:
    """A DiT's block: 4 N d^2 + 2 N^2 d for attention and 8 N d^2 for the feed-forward, for each sample."""
    network = opened("dit")
    costs = costs_of(network, calls("dit")[0])
    tokens, width, samples = 16, 64, 2
    attention, feed_forward = 4 * tokens * width**2 + 2 * tokens**2 * width, 8 * tokens * width**2
    assert costs.module_macs == (samples * attention, samples * feed_forward) * 2
    assert costs.module_bytes == (samples * tokens * width * 4,) * 4
    assert costs.fixed > 0


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_seconds_are_those_on_the_clock(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module takes a second of its own, and the denoiser one more; the median forgets a round that was disturbed."""
    network = opened(family)
    clock = Ticks(network)
    monkeypatch.setattr(synchronized_clock, "host_clock", clock)
    count = len(cached_modules_of(network))
    assert seconds_of(network, calls(family)[0], rounds=3) == (1 + count, (1,) * count)
    rounds = iter((0, 0, 90, 0))
    network.module.register_forward_pre_hook(lambda *_: setattr(clock, "seconds", clock.seconds + next(rounds)))
    assert seconds_of(network, calls(family)[0], rounds=3)[0] == 1 + count


def test_the_cost_of_a_joined_block_is_that_of_its_parts() -> None:
    """Flux: 4 N d^2 + 2 N^2 d for joint attention; 12 N d^2 + 2 N^2 d where one linear joins attention and feed-forward."""
    costs = costs_of(opened("flux"), calls("flux")[0])
    image, text, width, samples = 16, 7, 64, 2
    tokens, square = image + text, width**2
    mixing = 2 * tokens**2 * width
    joint, joined = 4 * tokens * square + mixing, 12 * tokens * square + mixing
    macs = (joint, 8 * image * square, 8 * text * square, joined, joined)
    assert costs.module_macs == tuple(samples * one for one in macs)
    assert costs.module_bytes == tuple(samples * many * width * 4 for many in (tokens, image, text, tokens, tokens))


def test_bytes_are_those_that_views_keep() -> None:
    """The last block of SD3 gives its text's attention as a part of that of both."""
    costs = costs_of(opened("sd3"), calls("sd3")[0])
    samples, image, text, row = 2, 16, 7, 64 * 4
    assert costs.module_bytes[0] == samples * (image + text) * row
    assert costs.module_bytes[4] == samples * (image + image + text) * row


def test_schedules_of_other_networks_are_refused() -> None:
    state = schedule_state(
        opened("dit"), Trajectories.of(opened("dit"), calls("dit")), lambda steps, modules: torch.ones(steps, modules, dtype=torch.bool)
    )
    assert Schedule.of(opened("dit"), state).computed_TN.all()
    with pytest.raises(AerogelError, match="the schedule is of 4 modules, this denoiser has 6; transformer_blocks"):
        Schedule.of(opened("pixart"), state)
    with pytest.raises(AerogelError, match="names no modules"):
        cached_modules_of(opened("llama"))
