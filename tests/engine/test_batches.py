"""Calls that do not fit into a device's memory run in halves: the same statistics, the same weights, and the report says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising
from aerogel.engine.calibration import Samples, prepare, with_batch_size
from aerogel.engine.opening import open_model
from aerogel.engine.scores import measure_models
from aerogel.engine.visits import before_again
from aerogel.errors import AerogelError
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.placement import HOST, Placement
from aerogel.model.walk import blocks_of
from tests import simulated_device
from tests.folders import model_folder, text_file
from tests.simulated_device import Watch
from tests.tiny import FAMILIES, opened, output

LENGTH = 16


@pytest.fixture
def watch() -> Iterator[Watch]:
    """An accelerator that torch reports."""
    with simulated_device.present() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("batches")
    text_file(made / "text.txt", 20000)
    return model_folder(made / "model")


def rows(count: int, seed: int = 0) -> Call:
    """One call of so many sequences."""
    ids = torch.randint(3, 112, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})


def no_more_than(sequences: int, after: int = 0) -> Callable[[Any, list[Tensor]], bool]:
    """Refuse attention over more sequences at once, once it was given some so many times."""
    seen = 0

    def limit(op: Any, operands: list[Tensor]) -> bool:
        nonlocal seen
        large = "softmax" in str(op) and operands[0].ndim == 4 and len(operands[0]) > sequences
        seen += large
        return large and seen > after

    return limit


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", ["gptq", *(pytest.param(method, marks=SLOW) for method in ("awq", "smoothquant", "brecq"))])
def test_halves_give_what_whole_calls_give(method: str, watch: Watch) -> None:
    options = {
        "smoothquant": {},
        "brecq": {"scheme": "W8A16_G32", "targets": ["Linear"], "steps": 2, "batch": 1},
        "awq": {"scheme": "W8A16_G32", "search_space": 2},
    }
    recipe = {"steps": [{method: options.get(method, {"scheme": "W8A16_G32"})}]}
    calls, asked = [rows(4), rows(3, 1)], rows(2, 2)
    whole, halved = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    before = aerogel.compress(whole, recipe, samples=calls, measures=(), device="simulated")
    watch.limit = no_more_than(1)
    with pytest.warns(UserWarning, match="calls of the calibration ran in up to 4 parts, because simulated:0 had too little memory"):
        result = aerogel.compress(halved, recipe, samples=calls, measures=(), device="simulated")
    assert watch.refused >= 2
    assert result.facts["provenance"]["calibration"]["memory"].startswith("calls of the calibration ran in up to 4 parts")
    names = [line["name"] for line in result.journal]
    assert len(names) == len(set(names)), "what was noted before the memory ended is noted once"
    for line, wanted in zip(result.journal, before.journal, strict=True):
        assert line.get("error") == (None if wanted.get("error") is None else pytest.approx(wanted["error"], rel=0.1))
    watch.limit = lambda op, operands: False
    # Of scales that cost the same, AWQ takes the first, and sums in another order can change which cost the same.
    torch.testing.assert_close(output(halved, asked), output(whole, asked), rtol=0, atol=5e-2 if method == "awq" else 1e-4)


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        pytest.param("the trace", 0, marks=SLOW),
        pytest.param("the first look of the visit", 2, marks=SLOW),
        ("when three layers are quantized", 3),
        pytest.param("the last pass", 6, marks=SLOW),
    ],
)
def test_wherever_the_memory_ends(watch: Watch, stage: str, after: int) -> None:
    """Also in the middle of a method that has changed half of a block: what it did is undone."""
    calls, asked = [rows(2), rows(2, 1)], rows(2, 2)
    whole, halved = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    recipe = {"steps": [{"gptq": {"scheme": "W8A16_G32", "true_sequential": True, "max_activation_gb": 0}}]}
    aerogel.compress(whole, recipe, samples=calls, measures=(), device="simulated")
    watch.limit = no_more_than(1, after)
    with pytest.warns(UserWarning, match="up to 2 parts"):
        aerogel.compress(halved, recipe, samples=calls, measures=(), device="simulated")
    assert watch.refused == 1, stage
    watch.limit = lambda op, operands: False
    torch.testing.assert_close(output(halved, asked), output(whole, asked), rtol=1e-4, atol=1e-4)


def test_a_block_is_put_back_as_it_was(watch: Watch) -> None:
    """Values, modules, notes and what was pruned or learned; and its targets are made anew."""
    network = opened("llama")
    network.placed = Placement(simulated_device.device(), HOST)
    network.pruned.add("another")
    step_size, asked = torch.tensor(1.0), rows(2)
    expected = output(network.module, asked)
    block = next(blocks_of(network))
    block.parameters = {"step_size": step_size}
    block.note("before")
    told: list[Block] = []
    again = before_again(block, told.append)
    linear = block.module.get_submodule("mlp.up_proj")
    with torch.no_grad():
        linear.weight *= 2
    block.module.get_submodule("input_layernorm").weight = nn.Parameter(torch.zeros(64))
    block.replace("mlp.down_proj", nn.Identity())
    block.prune("self_attn.q_proj", torch.zeros(64, 64, dtype=torch.bool))
    block.note("after")
    block.outputs = []
    block.parameters["step_size"] = torch.tensor(2.0)
    again()
    assert torch.equal(output(network.module, asked), expected)
    assert block.module.get_submodule("mlp.up_proj") is linear
    assert [note["name"] for note in block.notes] == [f"{block.name}.before"]
    assert network.pruned == {"another"}
    assert block.parameters["step_size"] is step_size
    assert block.outputs is None
    assert told == [block]


def test_one_sample_that_does_not_fit_is_refused(watch: Watch) -> None:
    watch.limit = no_more_than(0)
    with pytest.raises(AerogelError, match=r"simulated:0 has too little memory for one sample at a time \(.*\); give shorter samples"):
        aerogel.compress(
            FAMILIES["llama"].build(), {"steps": [{"gptq": {"scheme": "W4A16_G32"}}]}, samples=[rows(4)], measures=(), device="simulated"
        )


@SLOW
def test_a_run_from_a_folder_halves_and_is_saved(folder: Path, tmp_path: Path, watch: Watch) -> None:
    recipe = {"steps": [{"gptq": {"scheme": "W4A16_G32"}}]}
    read = Samples(folder.parent / "text.txt", count=4, length=LENGTH)
    aerogel.compress(folder, recipe, samples=read, output=tmp_path / "whole", measures=())
    watch.limit = no_more_than(2)
    with pytest.warns(UserWarning, match="up to 2 parts"):
        result = aerogel.compress(folder, recipe, samples=read, output=tmp_path / "halved", measures=())
    assert "ran in up to 2 parts" in result.report().read_text()
    whole, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == halved.keys()
    for name, tensor in whole.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(halved[name], tensor, rtol=1e-3, atol=1e-4)


def test_models_that_do_not_fit_as_a_whole_are_not_measured(folder: Path, tmp_path: Path, watch: Watch) -> None:
    recipe = {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
    watch.limit = no_more_than(0)
    with pytest.warns(UserWarning, match="not measured: the whole models do not fit into the memory of simulated:0"):
        result = aerogel.compress(folder, recipe, output=tmp_path / "out", measures=["perplexity"])
    assert not result.metrics.get("compressed")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_runs_the_whole_model_says_that_it_does_not_fit(folder: Path, watch: Watch) -> None:
    read = Samples(folder.parent / "text.txt", count=2, length=LENGTH)
    watch.limit = no_more_than(0)
    with pytest.raises(AerogelError, match=r"what is measured does not fit into the memory of the device \(.*\); give device cpu"):
        measure_models(str(folder), None, ["perplexity"])
    with pytest.raises(AerogelError, match="a step of this recipe does not fit into the memory of the device"):
        aerogel.compress(folder, {"steps": [{"attention_quant": {}}]}, samples=read, measures=())
    watch.limit = lambda op, operands: "copy" in str(op)
    with pytest.raises(AerogelError, match="the model does not fit into the memory of the device"):
        aerogel.load(folder)


@pytest.mark.parametrize(("size", "sequences"), [("auto", [6]), (4, [4, 2]), (1, [1] * 6)])
def test_a_batch_size_is_the_sequences_of_a_call(folder: Path, size: Any, sequences: list[int]) -> None:
    network = open_model(folder)
    read = with_batch_size(Samples(folder.parent / "text.txt", count=6, length=LENGTH), size)
    assert [len(call.kwargs["input_ids"]) for call in prepare(network, read, 0, head=False).calls] == sequences


def test_batch_sizes_of_other_data() -> None:
    assert with_batch_size(Denoising(), 3) == Denoising(batch=3)
    assert with_batch_size(Chats("chats.jsonl"), 3) == Chats("chats.jsonl", batch=3)
    assert with_batch_size(Chats("chats.jsonl"), "auto") == Chats("chats.jsonl")
    with pytest.raises(AerogelError, match="batch_size does not apply to recorded calls"):
        with_batch_size([rows(2)], 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, "many", True])
def test_other_batch_sizes_are_refused(size: Any) -> None:
    with pytest.raises(AerogelError, match=f"batch_size is {size!r}; give auto, or how many sequences"):
        with_batch_size(Samples(), size)


def test_compress_takes_a_batch_size(folder: Path) -> None:
    read = Samples(folder.parent / "text.txt", count=4, length=LENGTH)
    with pytest.raises(AerogelError, match="batch_size is 0"):
        aerogel.compress(folder, {"steps": [{"gptq": {}}]}, samples=read, measures=(), batch_size=0)
