"""Two processes that hold half of the weights each come to what two with all of them do, and afterwards nothing is left of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.feature_cache.harmonica import Harmonica
from aerogel.model.processes import Processes
from aerogel.runtime.feature_cache.controlled import controlled
from aerogel.training.sharded import sharded
from tests import image_pipelines, process_group
from tests.runtime.feature_cache.test_replay import SAMPLERS, dit_pipeline, recorded

OPTIONS: dict[str, Any] = {"ratio": 0.4, "trajectories": 6, "refresh": 3, "search": 10, "samples": 4}


def state_of(module: nn.Module) -> list[Any]:
    """Everything of every module that sharding might touch, by identity."""
    return [
        (
            type(part),
            sorted(vars(part)),
            [(name, id(held), list(held.items())) for name, held in vars(part).items() if isinstance(held, dict)],
        )
        for part in module.modules()
    ]


def held(module: nn.Module) -> int:
    """Bytes of parameters that this process has."""
    tensors = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in module.parameters())
    return sum(tensor.nbytes for tensor in tensors)


def calibrated(network: Any, calls: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    return listed(Harmonica(**OPTIONS | options).calibrate(network, calls))


def pipeline() -> Any:
    made = image_pipelines.classes()
    made.scheduler = SAMPLERS["ddim"]()
    return made


def listed(state: Any) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.as_dict().items()}


@contextmanager
def in_parts(network: Any, call: Any, brought: list[str]) -> Iterator[None]:
    with sharded(network.module, network.blocks(), network.device, brought.append, lambda: network.run(call)):
        yield


def compressed(model: Any, processes: Processes, **options: Any) -> dict[str, Any]:
    """The router of a denoiser that was pruned, against what it was before."""
    recipe = {"steps": [{"magnitude": {}}, {"harmonica": {**OPTIONS, **options}}]}
    samples = Denoising(count=8, steps=5, batch=4, guidance=3.0)
    (policy,) = aerogel.compress(model, recipe, samples=samples, measures=(), processes=processes).policies
    return listed(policy.state)


def work(folder: Path) -> dict[str, Any]:
    """What each of two processes does."""
    processes = Processes.join("cpu")
    network = dit_pipeline()
    calls = recorded(network, count=8, batch=4)
    before, whole = state_of(network.module), held(network.module)
    wanted, output = calibrated(network, calls), network.run(calls[0])[0]
    found: dict[str, Any] = {"wanted": wanted, "whole": whole, "brought": []}
    for _ in range(2):  # what was taken off can be put on once more
        with in_parts(network, calls[0], found["brought"]):
            found["part"] = held(network.module)
            found["same output"] = torch.equal(network.run(calls[0])[0], output)
            found["found"] = calibrated(network, calls)
            found["after"] = held(network.module)
        found["left"] = state_of(network.module) == before
    with in_parts(network, calls[0], []), controlled(network), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    found["left after an error"] = state_of(network.module) == before and torch.equal(network.run(calls[0])[0], output)
    found["with checkpoints"] = calibrated(network, calls, checkpointing=True)
    with in_parts(network, calls[0], []):
        found["checkpoints in parts"] = calibrated(network, calls, checkpointing=True)
    aerogel.compress(network, {"steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}]}, measures=())
    with cache_dequantized(network.module):  # not by the kernel that is fastest
        output = network.run(calls[0])[0]
        with in_parts(network, calls[0], []):
            found["same quantized output"] = torch.equal(network.run(calls[0])[0], output)
    for name, models in {"memory": (pipeline(), pipeline()), "folder": (folder, folder)}.items():
        found[name] = [compressed(model, processes, fsdp=fsdp) for model, fsdp in zip(models, (False, True), strict=True)]
    processes.leave()
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both found."""
    folder = tmp_path_factory.mktemp("sharded")
    pipeline().save_pretrained(folder / "dit")
    ended = process_group.run(folder / "group", work, folder / "dit")
    assert [one.code for one in ended] == [0, 0], [one.printed for one in ended]
    return [one.answer for one in ended]


@pytest.mark.slow
def test_a_router_is_bit_for_bit_the_one_trained_with_whole_weights(pair: list[dict[str, Any]]) -> None:
    for one in pair:
        assert one["same output"]
        assert one["same quantized output"]
        assert one["found"] == one["wanted"] == pair[0]["wanted"]
        assert one["checkpoints in parts"] == one["with checkpoints"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_recipe_holds_the_model_and_its_teacher_in_parts(pair: list[dict[str, Any]], where: str) -> None:
    for one in pair:
        whole, in_parts = one[where]
        assert in_parts == whole
        assert in_parts["error"] > 0


@pytest.mark.slow
def test_each_process_holds_its_part_of_the_blocks(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    assert first["part"] + second["part"] == pytest.approx(first["whole"], rel=0.01)
    assert abs(first["part"] - second["part"]) < 0.05 * first["whole"]
    assert first["after"] < first["whole"], "blocks are in parts again after a forward"


@pytest.mark.slow
def test_afterwards_nothing_is_left_of_it(pair: list[dict[str, Any]]) -> None:
    for one in pair:
        assert one["left"]
        assert one["left after an error"]
        assert one["brought"] == ["transformer_blocks.0"] * 4, "twice in each sharding: to see how it is called, and for good"
