"""Timing of pipelines: who has a turn when, what a turn is, and what cannot be timed."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

import aerogel
from aerogel.errors import AerogelError
from aerogel.evaluate import sampling
from aerogel.evaluate.sampling import Sampling
from tests.image_pipelines import classes, unconditional
from tests.tiny import opened

KNOBS: dict[str, Any] = {"batch": 3, "steps": 4, "rounds": 3}


def test_turns_alternate_and_speedups_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    count = itertools.count()

    def make(self: sampling._Runner) -> tuple[float, list[float]]:
        name = "slow" if self.network is slow else "fast"
        turns.append(name)
        second = (6.0 if name == "slow" else 2.0) * 2 ** (next(count) // 2)  # the machine gets slower from round to round
        return second, [second / 10, second / 5, second / 5]

    monkeypatch.setattr(sampling._Runner, "_make", make)
    slow, fast = aerogel.load(unconditional()), aerogel.load(unconditional())
    found = Sampling(**KNOBS).compare({"slow": slow, "fast": fast})
    assert turns == ["slow", "fast"] * 4
    assert found["fast"]["speedup"] == pytest.approx(3)
    assert found["fast"]["denoiser_speedup"] == pytest.approx(3)
    assert found["slow"]["speedup"] == 1
    # The second turn that counts is the median: 2 s, doubled twice.
    assert found["fast"]["images_per_minute"] == pytest.approx(60 * 3 / 8)
    assert found["fast"]["denoiser_milliseconds"] == pytest.approx(1600)


@pytest.mark.parametrize("make", [classes, unconditional])
def test_a_turn_is_a_run_of_the_whole_pipeline(make: Any) -> None:
    network, seen = aerogel.load(make()), list[int]()
    network.module.register_forward_hook(lambda _, __, output: seen.append(len(output.sample)))
    before = dict(network.module._forward_hooks), torch.get_num_threads()
    found = Sampling(**KNOBS, threads=1).measure(network)
    guided = 2 if make is classes else 1
    assert seen == [3 * guided] * 4 * 4, "four steps in each of four turns"
    assert 0 < found["denoiser_milliseconds"] * 4 / 1000 <= 3 * 60 / found["images_per_minute"]
    assert found["peak_memory_bytes"] >= sum(tensor.nbytes for tensor in network.module.parameters())
    assert {name: found[name] for name in (*KNOBS, "guidance", "threads", "device")} == {
        **KNOBS, "guidance": None, "threads": 1, "device": "cpu",
    }  # fmt: skip
    assert (dict(network.module._forward_hooks), torch.get_num_threads()) == before


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(AerogelError, match=re.escape("batch 0, steps 4, rounds 3: each is at least 1")):
        Sampling(**KNOBS | {"batch": 0}).measure(aerogel.load(unconditional()))
    with pytest.raises(AerogelError, match="came without its pipeline"):
        Sampling().measure(opened("dit"))
    with pytest.raises(AerogelError, match="knows no guidance"):
        Sampling(guidance=2.0).measure(aerogel.load(unconditional()))
