"""Two processes, each with its share of the images, come to what one makes of all; one alone does nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from aerogel.errors import AerogelError
from aerogel.kernels import synchronized_clock
from aerogel.methods.feature_cache.harmonica import Harmonica
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache import sharding
from aerogel.runtime.feature_cache.replay import Replay, replays
from aerogel.runtime.feature_cache.sharding import shares_of
from aerogel.training import distributed as processes
from aerogel.training.distributed import averaged, of_first, share, variance
from tests.clocks import Counter
from tests.runtime.feature_cache.test_replay import dit_pipeline, recorded

OPTIONS: dict[str, Any] = {"ratio": 0.4, "trajectories": 8, "refresh": 4, "search": 30, "samples": 8}
IMAGES = {"count": 8, "batch": 4}
VALUES = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) + torch.arange(6).unsqueeze(1)
"""Of different means in each half."""


def calibrated() -> dict[str, Any]:
    network = dit_pipeline()
    state = Harmonica(**OPTIONS).calibrate(network, recorded(network, **IMAGES))
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.as_dict().items()}


def refused(runs: list[Replay]) -> str:
    try:
        shares_of(runs)
    except AerogelError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    synchronized_clock.host_clock = Counter(step=1.0 + rank)  # the second process is half as fast
    mine, network = share(VALUES), dit_pipeline()
    found = {
        "variance": float(variance(mine)),
        "mean": averaged(mine.mean()).item(),
        "first": of_first(torch.tensor([rank + 5])).tolist(),
        "budget": Harmonica(target_speedup=1.1).budget(network, Trajectories.of(network, recorded(network))).cost_N,
        "odd": refused(replays(network, Trajectories.of(network, recorded(network, count=3, batch=3)))),
        "different": refused(replays(network, Trajectories.of(network, recorded(network)))[: 1 + rank]),
    }
    torch.manual_seed(7 + rank)  # the first process's is that of all
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found | {"state": calibrated()}))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both found."""
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(work, (str(folder),), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_router_is_the_one_that_a_single_process_trains_on_all_images(pair: list[dict[str, Any]]) -> None:
    first, second = (found["state"] for found in pair)
    assert first == second
    torch.manual_seed(7)
    wanted = calibrated()
    assert first.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, float) or key in ("scores", "lambda"):
            torch.testing.assert_close(torch.tensor(first[key]), torch.tensor(value), rtol=1e-5, atol=1e-5 * (key in ("scores", "lambda")))
        elif key == "log":
            for mine, theirs in zip(first[key], value, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-9)
        else:
            assert first[key] == value, key


def test_numbers_are_those_of_all_processes(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert found["variance"] == pytest.approx(float(VALUES.var()), rel=1e-6)
        assert found["mean"] == pytest.approx(float(VALUES.mean()), rel=1e-6)
        assert found["first"] == [5]
        assert found["budget"] == [1.0, 1.0], "the seconds of the first process"


def test_what_cannot_be_shared_is_refused(pair: list[dict[str, Any]]) -> None:
    assert all("batch of 3 images does not divide by the 2 processes" in found["odd"] for found in pair)
    assert pair[0]["different"] == ""
    assert "process 1 was given 2 generations of 5 steps and 8 samples, the first process 1 of 5 and 4" in pair[1]["different"]


def test_alone_everything_is_what_it_was() -> None:
    network = dit_pipeline()
    runs = replays(network, Trajectories.of(network, recorded(network)))
    assert all(same(VALUES) is VALUES for same in (averaged, of_first, share))
    assert torch.equal(variance(VALUES), VALUES.var())
    assert all(mine is run for mine, run in zip(shares_of(runs), runs, strict=True))


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_shares_are_whole_images_with_both_halves_of_guidance(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = dit_pipeline()
    (run,) = replays(network, Trajectories.of(network, recorded(network, count=4, batch=4, guidance=guidance)))
    for module in (processes, sharding):
        monkeypatch.setattr(module, "group_size", lambda: 2)
    monkeypatch.setattr(sharding, "of_first", lambda x: x)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares += shares_of([run])
    for step, call in enumerate(run.calls):
        parts = [mine.calls[step].kwargs for mine in shares]
        for name, given in call.kwargs.items():
            if not isinstance(given, Tensor):
                assert all(part[name] is given for part in parts)
                continue
            for number, half in enumerate(given.chunk(2 if run.halves else 1)):
                found = [part[name].chunk(2 if run.halves else 1)[number] for part in parts]
                assert torch.equal(torch.cat(found), half)
    assert shares[0].calls[0].kwargs["class_labels"] is shares[0].calls[1].kwargs["class_labels"], "kept once, as it was recorded"
