"""Two processes that share the calls end with what one process ends with; one writes and prints, and no failure hangs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.cli.commands import main
from aerogel.engine import policies
from aerogel.engine.calibration import Samples
from aerogel.engine.opening import open_model
from aerogel.engine.preflight import partial_of
from aerogel.engine.progress import Event
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.processes import ALONE, Processes
from aerogel.model.structure.towers import Tower
from tests import process_group, simulated_device
from tests.folders import model_folder, text_file
from tests.methods.matrix import answers, case
from tests.model.test_walk import HOURGLASS, Hourglass
from tests.process_group import Ended
from tests.tiny import FAMILIES, output

BLOCKS = 2
SLOW = pytest.mark.slow
RECIPES: dict[str, Any] = {
    "gptq": [{"gptq": {"scheme": "W4A16_G32", "overrides": {"*.down_proj": "W8A8_STATIC", "*.up_proj": "NVFP4A16"}}}],
    "smoothquant": [{"smoothquant": {"alpha": "search"}}, {"rtn": {"scheme": "W8A8_STATIC", "input_range": "average"}}],
    "brecq": [{"smoothquant": {}}, {"brecq": {"scheme": "W4A16_G32", "targets": ["Linear"], "steps": 3, "batch": 2}}],
}
MORE_RECIPES: dict[str, Any] = {
    "passes": [{"gptq": {"scheme": "W4A16_G32_ASYM", "act_order": "group", "true_sequential": True, "max_activation_gb": 0}}],
    "awq": [{"awq": {"scheme": "W4A16_G32", "search_space": 4, "unmapped": "keep"}}],
    "rotated": [{"rotate": {}}, {"rtn": {"scheme": "W4A16_G32"}}, {"attention_quant": {}}],
}
METHODS_OF_TINY = [("awq", "llama"), ("gptq", "qwen3_moe"), ("modes", "qwen3_moe"), ("activation_ranges", "dit"), ("harmonica", "dit")]
GPTQ = {"steps": [{"gptq": {"scheme": "W8A16_G32"}}]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    text_file(folder / "text.txt", 20000)
    model_folder(folder / "model", num_hidden_layers=BLOCKS)
    (folder / "own.yaml").write_text("steps:\n  - gptq: {scheme: W4A16_G32}\n")
    return folder


def options(desk: Path) -> dict[str, Any]:
    return {"samples": Samples(desk / "text.txt", count=13, length=64, batch_size=2), "measures": ()}


def of_tiny(method: str, family: str, processes: Processes = ALONE) -> list[Tensor]:
    """What a tiny model in memory answers after a method of the matrix."""
    found = case(method, family)
    result = compress(found.example.copied(), found.recipe, samples=found.example.calls, measures=(), processes=processes)
    with policies.on(result.network, result.policies), cache_dequantized(result.network.module):  # not by the kernel that is fastest
        return answers(result.network, found.example.calls)


def with_short_calls(processes: Processes = ALONE) -> Tensor:
    """What a model answers of which some blocks are reached by no call of the second process."""
    torch.manual_seed(0)
    network = Network(Hourglass(), HOURGLASS)
    network.towers = (Tower("cells", tuple(f"cells.{number}" for number in range(4))),)
    calls = [Call((torch.randn(50, 6),), {"short": number > 1}) for number in range(4)]
    compress(network, {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}, samples=calls, measures=(), processes=processes)
    with cache_dequantized(network.module):
        return network.run(calls[0])


def with_little_memory(processes: Processes = ALONE) -> tuple[Tensor, str]:
    """What a model answers when the memory of the second process ends after a while, and how its report tells of that."""
    seen = 0

    def limit(op: Any, operands: list[Tensor]) -> bool:
        nonlocal seen
        large = processes.rank == 1 and "softmax" in str(op) and operands[0].ndim == 4 and len(operands[0]) > 1
        seen += large
        return large and seen > 3

    ids = torch.randint(3, 112, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    calls = [Call((), {"input_ids": part, "use_cache": False}) for part in ids]
    module = FAMILIES["llama"].build()
    with simulated_device.present() as watch:
        watch.limit = limit
        result = compress(module, GPTQ, samples=calls, measures=(), device="simulated", processes=processes)
    with cache_dequantized(module):
        return output(module, calls[0]), str(result.facts["provenance"]["calibration"].get("memory"))


def everything(desk: Path, recipes: dict[str, Any], methods: list[tuple[str, str]]) -> dict[str, Any]:
    """What one of two processes found."""
    processes = Processes.join()
    journals = {}
    for name, steps in recipes.items():
        result = compress(desk / "model", {"steps": steps}, output=desk / f"two-{name}", processes=processes, **options(desk))
        journals[name] = result.journal
    found = {
        "journals": journals,
        "answers": {pair: of_tiny(*pair, processes) for pair in methods},
        "short": with_short_calls(processes),
        "memory": with_little_memory(processes),
    }
    processes.leave()
    return found


def of_both(desk: Path, name: str, *given: Any) -> list[dict[str, Any]]:
    ended = process_group.run(desk / name, everything, desk, *given)
    assert [one.code for one in ended] == [0, 0], [one.printed for one in ended]
    return [one.answer for one in ended]


@pytest.fixture(scope="module")
def both(desk: Path) -> list[dict[str, Any]]:
    """What both processes found."""
    return of_both(desk, "both", RECIPES, METHODS_OF_TINY)


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder; quantized ones as what they stand for."""
    module = open_model(folder, lazy=False).module
    found = {name: part.dequantized(torch.float32) for name, part in module.named_modules() if isinstance(part, QuantLinear)}
    return found | {name: tensor.float() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def require_alike(desk: Path, name: str, steps: Any, found: list[dict[str, Any]]) -> None:
    """Compare the folder of two processes with that of one: sums in another order may move a few weights to the next value."""
    result = compress(desk / "model", {"steps": steps}, output=desk / f"one-{name}", **options(desk))
    one, two = weights(desk / f"one-{name}"), weights(desk / f"two-{name}")
    assert one.keys() == two.keys()
    for key, wanted in one.items():
        torch.testing.assert_close(two[key].norm(), wanted.norm(), rtol=1e-3, atol=1e-5)
        assert (~torch.isclose(two[key], wanted, rtol=1e-3, atol=1e-5)).float().mean() <= 0.01, key
    first, second = (one["journals"][name] for one in found)
    assert first == second
    for mine, theirs in zip(first, result.journal, strict=True):
        assert {**mine, "error": 0} == pytest.approx({**theirs, "error": 0}) if "damping" in mine else mine["name"] == theirs["name"]
        assert mine.get("error", 0) == pytest.approx(theirs.get("error", 0), rel=0.01)
    assert not partial_of(desk / f"two-{name}").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_write_what_one_writes(name: str, desk: Path, both: list[dict[str, Any]]) -> None:
    require_alike(desk, name, RECIPES[name], both)


@pytest.mark.parametrize(("method", "family"), METHODS_OF_TINY)
def test_methods_of_every_kind(method: str, family: str, both: list[dict[str, Any]]) -> None:
    for wanted, *found in zip(of_tiny(method, family), *(one["answers"][method, family] for one in both), strict=True):
        for answer in found:
            torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)


def test_a_block_that_no_call_of_a_process_reaches(both: list[dict[str, Any]]) -> None:
    for found in both:
        torch.testing.assert_close(found["short"], with_short_calls(), rtol=1e-4, atol=1e-5)


def test_all_halve_their_calls_when_the_memory_of_one_ends(both: list[dict[str, Any]]) -> None:
    wanted, told = with_little_memory()
    assert told == "None"
    for found, told in (one["memory"] for one in both):
        assert told.startswith("calls of the calibration ran in up to 2 parts")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def killed(desk: Path, folder: Path, dying: int) -> str:
    """A run in which one process kills itself at the second block."""
    processes = Processes.join()

    def tell(event: Event) -> None:
        if (event.stage, event.done, processes.rank) == ("compress", 1, dying) and event.what:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        compress(desk / "model", {"steps": RECIPES["gptq"]}, output=folder, tell=tell, processes=processes, **options(desk))
    except AerogelError as error:
        return str(error)
    return "it ended"


def resumed(desk: Path, folder: Path) -> list[str]:
    processes = Processes.join()
    seen: list[Event] = []
    compress(desk / "model", {"steps": RECIPES["gptq"]}, output=folder, resume=True, tell=seen.append, processes=processes, **options(desk))
    processes.leave()
    return [event.what for event in seen if event.stage == "compress" and event.what]


@pytest.mark.parametrize("dying", [1, pytest.param(0, marks=SLOW)])
def test_a_run_resumes_after_one_process_was_killed(dying: int, desk: Path, tmp_path: Path, both: list[dict[str, Any]]) -> None:
    folder = tmp_path / "out"
    ended = process_group.run(tmp_path / "killed", killed, desk, folder, dying)
    assert ended[dying].code == -signal.SIGKILL
    assert "another process of this run has ended" in ended[1 - dying].answer
    assert {path.name for path in (partial_of(folder) / "stage-0").iterdir()} == {"blocks", "process-0", "process-1"}
    with pytest.raises(AerogelError, match=r"was started with another number of processes \(2, now 1\); give the same"):
        compress(desk / "model", {"steps": RECIPES["gptq"]}, output=folder, resume=True, **options(desk))
    again = process_group.run(tmp_path / "resumed", resumed, desk, folder)
    assert [one.code for one in again] == [0, 0], [one.printed for one in again]
    assert [one.answer for one in again] == [["model.layers.1"]] * 2
    assert (folder / "model.safetensors").read_bytes() == (desk / "two-gptq" / "model.safetensors").read_bytes()


def command(desk: Path, *others: str) -> list[str]:
    given = ["--recipe", str(desk / "own.yaml"), "--data", str(desk / "text.txt"), "--length", "24", "--batch-size", "1", "--no-evaluate"]
    return ["compress", str(desk / "model"), *given, *others]


def run_command(arguments: list[str]) -> int:
    """Run a command line; returns its exit code."""
    sys.argv = ["aerogel", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def printed(ended: list[Ended]) -> list[str]:
    return [line for one in ended for line in one.printed.splitlines()]


def test_an_error_that_all_find_is_printed_once(desk: Path, tmp_path: Path) -> None:
    ended = process_group.run(tmp_path / "group", run_command, command(desk, "--samples", "1", "--output", str(tmp_path / "out")))
    assert [one.answer for one in ended] == [2, 2], printed(ended)
    (line,) = printed(ended)
    assert line.startswith("error: the calibration has fewer calls (1) than there are processes to share them (2); give more samples")
    assert not (tmp_path / "out").exists()
    assert not partial_of(tmp_path / "out").exists()
