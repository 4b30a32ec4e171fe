"""Timing of pipelines: who has a turn when, what a turn is, and what cannot be timed."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

import aerogel
from aerogel.errors import AerogelError
from aerogel.evaluate.sampling import Sampling
from aerogel.kernels import synchronized_clock
from aerogel.model.network import Network
from tests.clocks import Manual
from tests.image_pipelines import classes, unconditional
from tests.tiny import opened

OPTIONS: dict[str, Any] = {"batch": 3, "steps": 4, "rounds": 3}


def test_turns_alternate_and_speedups_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    clock = Manual()
    monkeypatch.setattr(synchronized_clock, "host_clock", clock)

    def scripted(name: str, seconds: float) -> Network:
        """A network whose denoiser takes so long at three of four steps and half of it at the first; slower by half from turn to turn."""
        network, count = aerogel.load(unconditional()), itertools.count()

        def moved(*_: Any) -> None:
            turn, step = divmod(next(count), 4)
            turns.extend([name] * (step == 0))
            clock.seconds += seconds * (1 if step else 0.5) * 1.5**turn

        network.module.register_forward_hook(moved)
        return network

    found = Sampling(**OPTIONS).compare({"slow": scripted("slow", 6.0), "fast": scripted("fast", 2.0)})
    assert turns == ["slow", "slow", "fast", "fast"] + ["slow", "fast"] * 3
    assert found["fast"]["speedup"] == pytest.approx(3)
    assert found["fast"]["denoiser_speedup"] == pytest.approx(3)
    assert found["slow"]["speedup"] == 1
    # The second turn that counts is the median: steps of 2 s, half as long again three times, 3.5 of them a run of three images.
    assert found["fast"]["denoiser_milliseconds"] == pytest.approx(6750)
    assert found["fast"]["images_per_minute"] == pytest.approx(60 * 3 / (3.5 * 6.75))


@pytest.mark.parametrize("make", [classes, unconditional])
def test_a_turn_is_a_run_of_the_whole_pipeline(make: Any) -> None:
    network, seen = aerogel.load(make()), list[int]()
    network.module.register_forward_hook(lambda _, __, output: seen.append(len(output.sample)))
    before = dict(network.module._forward_hooks), torch.get_num_threads()
    found = Sampling(**OPTIONS, threads=1).measure(network)
    guided = 2 if make is classes else 1
    assert seen == [3 * guided] * 4 * 5, "four steps in each of five turns"
    # The clock of the tests moves by a second at each reading: two around each of four forwards, and one at the end.
    assert found["denoiser_milliseconds"] == 1000
    assert found["images_per_minute"] == 3 * 60 / 9
    assert found["peak_memory_bytes"] >= sum(tensor.nbytes for tensor in network.module.parameters())
    assert {name: found[name] for name in (*OPTIONS, "guidance", "threads", "device")} == {
        **OPTIONS, "guidance": None, "threads": 1, "device": "cpu",
    }  # fmt: skip
    assert (dict(network.module._forward_hooks), torch.get_num_threads()) == before


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(AerogelError, match=re.escape("batch 0, steps 4, rounds 3: each is at least 1")):
        Sampling(**OPTIONS | {"batch": 0}).measure(aerogel.load(unconditional()))
    with pytest.raises(AerogelError, match="came without its pipeline"):
        Sampling().measure(opened("dit"))
    with pytest.raises(AerogelError, match="knows no guidance"):
        Sampling(guidance=2.0).measure(aerogel.load(unconditional()))
