"""What the plan says of memory: that of the host and that of the accelerator apart, and that a run which cannot fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine import estimates
from aerogel.engine.calibration import Samples
from aerogel.engine.estimates import measured_flops_a_second
from aerogel.engine.opening import open_model
from aerogel.engine.planning import Plan, plan
from aerogel.errors import AerogelError
from aerogel.model.placement import HOST, Placement
from aerogel.model.processes import Processes
from tests import image_pipelines, simulated_device
from tests.folders import model_folder, text_file
from tests.runtime.feature_cache.test_replay import SAMPLERS
from tests.simulated_device import Watch
from tests.tiny import FAMILIES

GPTQ: dict[str, Any] = {"name": "walked", "steps": [{"gptq": {"scheme": "W4A16_G32"}}]}
ROTATED: dict[str, Any] = {"name": "whole", "steps": [{"rotate": {}}, *GPTQ["steps"]]}
READ = Samples("sotu", count=8, length=32)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """An accelerator that torch reports."""
    with simulated_device.present() as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with so many layers."""
    made = tmp_path_factory.mktemp("memory")
    text_file(made / "text.txt", 20000)
    return {layers: model_folder(made / str(layers), num_hidden_layers=layers) for layers in (2, 6)}


def planned(model: Any, recipe: dict[str, Any] = GPTQ, **options: Any) -> Plan:
    return plan(model, recipe, samples=options.pop("samples", READ), flops_a_second=lambda: 1e9, **options)


def test_a_cpu_has_no_other_memory(folders: dict[int, Path], watch: Watch) -> None:
    made = planned(folders[2], device="cpu")
    assert (made.device, made.device_memory_bytes) == ("cpu", 0)
    assert made.as_dict()["device"] == "cpu"
    assert made.problems == ()


def test_blocks_of_a_folder_come_one_by_one(folders: dict[int, Path], watch: Watch) -> None:
    few, many = planned(folders[2]), planned(folders[6])
    assert few.device == many.device == "simulated:0"
    assert few.device_memory_bytes == many.device_memory_bytes > 0
    glue_and_two_blocks = 2 * 128 * 64 * 4 + 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert few.device_memory_bytes > glue_and_two_blocks
    # Only pages of the files, of which the larger model has more.
    assert few.peak_memory_bytes - many.peak_memory_bytes == few.source_bytes - many.source_bytes


def test_a_step_of_the_whole_model_takes_all_of_it(folders: dict[int, Path], watch: Watch) -> None:
    few, many = planned(folders[2], ROTATED), planned(folders[6], ROTATED)
    assert many.device_memory_bytes - few.device_memory_bytes == many.source_bytes - few.source_bytes
    assert few.device_memory_bytes > planned(folders[2]).device_memory_bytes


def test_a_module_in_memory_rests_where_it_is(watch: Watch) -> None:
    network, calls = FAMILIES["llama"].build(), FAMILIES["llama"].calls(2)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    brought = planned(network, samples=calls, device="simulated")
    there = planned(network.to(simulated_device.device()), samples=calls)
    assert brought.peak_memory_bytes == there.peak_memory_bytes + weights
    assert brought.device_memory_bytes < there.device_memory_bytes


def test_a_teacher_counts(folders: dict[int, Path], watch: Watch) -> None:
    taught = {"steps": [{"brecq": {"scheme": "W8A16_G32", "targets": ["Linear"], "steps": 1}}]}
    plain = {"steps": [{"awq": {"scheme": "W8A16_G32"}}]}
    assert planned(folders[2], taught).device_memory_bytes > planned(folders[2], plain).device_memory_bytes


@pytest.mark.parametrize("where", ["there", "brought"])
def test_weights_in_parts_take_their_part(watch: Watch, where: str) -> None:
    pipeline = image_pipelines.classes()
    pipeline.scheduler = SAMPLERS["ddim"]()
    device = simulated_device.device()
    blocks = sum(parameter.nbytes for parameter in pipeline.transformer.transformer_blocks.parameters())

    def device_memory(count: int, fsdp: bool, *before: dict[str, Any]) -> int:
        network, processes = open_model(pipeline), Processes(count=count, on_machine=1)
        network.placed = Placement(device, HOST if where == "brought" else device)
        steps = [*before, {"harmonica": {"ratio": 0.4, "fsdp": fsdp}}]
        return planned(network, {"steps": steps}, samples=Denoising(4, 5, 2), processes=processes).device_memory_bytes

    whole = device_memory(1, False)
    assert device_memory(1, True) == device_memory(4, False) == whole
    saved = blocks - blocks // 4
    assert whole - device_memory(4, True) == (0 if where == "there" else saved)
    whole_first: dict[str, Any] = {"rotate": {}}  # it runs on the whole network, but its teacher is for the router alone
    assert device_memory(4, False, whole_first) - device_memory(4, True, whole_first) == saved


def test_what_does_not_fit_on_the_device_is_refused(folders: dict[int, Path], watch: Watch) -> None:
    watch.memory = 50_000
    (problem,) = planned(folders[2]).problems
    assert problem.startswith("it needs about ")
    assert "on simulated:0, which has 50.0" in problem
    with pytest.raises(AerogelError, match=r"recipe 'walked': it needs about .* give device cpu, another device, or shorter samples"):
        aerogel.compress(folders[2], GPTQ, samples=READ, measures=())
    assert planned(folders[2], device="cpu").problems == ()


def test_a_batch_that_can_be_halved_is_not(folders: dict[int, Path], watch: Watch) -> None:
    wide, narrow = planned(folders[2]), planned(folders[2], batch_size=1)
    assert narrow.device_memory_bytes < wide.device_memory_bytes
    watch.memory = (narrow.device_memory_bytes + wide.device_memory_bytes) // 2
    assert planned(folders[2]).problems == ()


def test_what_does_not_fit_into_the_host_is_refused(folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "host_memory", lambda: 50_000)
    (problem,) = planned(folders[2], device="cpu").problems
    assert "of memory, and this machine has 50.0" in problem


def test_the_time_is_that_of_the_device(folders: dict[int, Path], watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_ACCELERATOR_PRODUCT", 8)
    monkeypatch.setattr(estimates, "_timed", estimates._timed.__wrapped__)  # which is once a process otherwise
    assert measured_flops_a_second(simulated_device.device()) > 0
    assert watch.operations["aten.mm.default"] >= 2
    before = watch.operations["aten.mm.default"]
    plan(folders[2], GPTQ, samples=READ)
    assert watch.operations["aten.mm.default"] > before
