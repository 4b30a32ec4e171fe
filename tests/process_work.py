"""What the processes of tests/engine/test_processes.py do; it imports little, as every process does."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aerogel
from aerogel.cli.commands import main
from aerogel.engine import policies
from aerogel.engine.calibration import Samples
from aerogel.engine.progress import Event
from aerogel.engine.run import compress
from aerogel.errors import AerogelError
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.quantization.gptq import Gptq
from aerogel.model.batches import Batches
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.placement import Placement
from aerogel.model.processes import ALONE, Processes
from aerogel.model.structure.towers import Tower
from tests import simulated_device
from tests.model.test_walk import HOURGLASS, Hourglass

RECIPES: dict[str, Any] = {
    "gptq": [{"gptq": {"scheme": "W4A16_G32", "overrides": {"*.down_proj": "W8A8_STATIC", "*.up_proj": "NVFP4A16"}}}],
    "awq": [{"awq": {"scheme": "W4A16_G32", "search_space": 4}}],
    "smoothquant": [{"smoothquant": {"alpha": "search"}}, {"rtn": {"scheme": "W8A8_STATIC", "input_range": "average"}}],
    "rtn": [{"rtn": {"scheme": "W4A16_G32"}}],
    "brecq": [{"smoothquant": {}}, {"brecq": {"scheme": "W4A16_G32", "targets": ["Linear"], "steps": 2, "batch": 2}}],
}
MORE_RECIPES: dict[str, Any] = {
    "passes": [{"gptq": {"scheme": "W4A16_G32_ASYM", "act_order": "group", "true_sequential": True, "max_activation_gb": 0}}],
    "kept": [{"awq": {"scheme": "W4A16_G32", "search_space": 4, "unmapped": "keep"}}],
    "rotated": [{"rotate": {}}, {"rtn": {"scheme": "W4A16_G32"}}, {"attention_quant": {}}, {"gptq": {"scheme": "W4A16_G32"}}],
    "pruned": [{"magnitude": {}}, {"gptq": {"scheme": "W4A16_G32"}}],
    "wanda": [{"erk": {}}, {"wanda": {"sparsity": None}}, {"reconstruct": {"steps": 2, "batch": 2}}],
    "sparsegpt": [{"sparsegpt": {}}],
    "joint": [{"sparsegpt": {"pattern": "2:4", "scheme": "W4A16_G32"}}],
}


def options(desk: Path) -> dict[str, Any]:
    """Return the calibration of all runs here: an odd number of calls."""
    return {"samples": Samples(desk / "text.txt", count=13, length=64, batch_size=2), "measures": ()}


def joined_twice() -> str:
    """Return the reason why processes do not join twice."""
    Processes.join()
    try:
        Processes.join()
    except AerogelError as error:
        return str(error)
    return ""


def in_folders(desk: Path, recipes: dict[str, Any]) -> dict[str, Any]:
    """Compress folders; returns what was noted by recipe, and what models in memory answer."""
    processes = Processes.join()
    journals = {}
    for name, steps in recipes.items():
        result = compress(desk / "model", {"steps": steps}, output=desk / f"two-{name}", processes=processes, **options(desk))
        journals[name] = result.journal
    found = {
        "journals": journals,
        "experts": with_experts(desk, processes),
        "short": with_short_calls(processes),
        "again": done_again(processes),
    }
    processes.leave()
    return found


def with_experts(desk: Path, processes: Processes = ALONE) -> dict[str, Tensor]:
    """Return the quantized weights of an MoE model in memory, whose experts are problems of one shape."""
    network = aerogel.load(desk / "moe", lazy=False)
    compress(network.module, {"steps": [{"gptq": {"scheme": "W8A16_G32"}}]}, processes=processes, samples=calls_of(8), measures=())
    return weights_of(network.module)


def calls_of(count: int) -> list[Call]:
    """Return calls of two sequences each."""
    ids = torch.randint(3, 112, (count, 2, 32), generator=torch.Generator().manual_seed(0))
    return [Call((), {"input_ids": part, "use_cache": False}) for part in ids]


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return weights; quantized ones as what they stand for."""
    parts = {name: part for name, part in module.named_modules() if hasattr(part, "dequantized")}
    found = {name: part.dequantized(torch.float32) for name, part in parts.items()}
    return found | {name: tensor.float() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def with_short_calls(processes: Processes = ALONE) -> Tensor:
    """Return what a model answers of which some blocks are reached by no call of the second process."""
    torch.manual_seed(0)
    network = Network(Hourglass(), HOURGLASS)
    network.towers = (Tower("cells", tuple(f"cells.{number}" for number in range(4))),)
    calls = [Call((torch.randn(50, 6),), {"short": number > 1}) for number in range(4)]
    compress(network, {"steps": [{"gptq": {"scheme": "W8A16_CHANNEL"}}]}, samples=calls, measures=(), processes=processes)
    with cache_dequantized(network.module):  # not by the kernel that is fastest
        return network.run(calls[0])


def done_again(processes: Processes) -> tuple[int, int, list[int]]:
    """Return how often work was done that two exchanges are part of, and what came out, when the second process first has no memory."""
    batches, tried = Batches(Placement()), 0
    batches.most_rows = 4

    def work() -> list[int]:
        nonlocal tried
        tried += 1
        processes.add_up(torch.zeros(1))
        if processes.rank == 1 and tried < 3:
            raise torch.OutOfMemoryError("too little memory")
        return processes.gather(10 * tried)

    found = batches.fit(work, processes=processes)
    return tried, batches.halvings, found


def in_little_memory(desk: Path) -> tuple[dict[str, Tensor], str]:
    """Compress while the memory of the second process ends."""
    processes = Processes.join()
    found = with_little_memory(desk, processes)
    processes.leave()
    return found


def with_little_memory(desk: Path, processes: Processes = ALONE) -> tuple[dict[str, Tensor], str]:
    """Return weights after the memory of the second process ended in the middle of a block, and how the report tells of that."""

    def limit(op: Any, operands: list[Tensor]) -> bool:
        # The trace and the search for shared inputs see one sample: the first whole call comes here with three layers quantized.
        return processes.rank == 1 and "softmax" in str(op) and operands[0].ndim == 4 and len(operands[0]) > 1

    module = aerogel.load(desk / "small", lazy=False).module
    recipe, given = {"steps": [{"gptq": {"scheme": "W8A16_G32"}}]}, {"samples": calls_of(2), "measures": ()}
    with nullcontext() if processes.alone else simulated_device.present() as watch:
        if watch is not None:
            watch.limit = limit
        device = "cpu" if processes.alone else simulated_device.NAME
        result = compress(module, recipe, device=device, processes=processes, **given)
    return weights_of(module), str(result.facts["provenance"]["calibration"].get("memory"))


def of_matrix(methods: list[tuple[str, str]]) -> list[list[Tensor]]:
    """Return what tiny models in memory answer after methods of the matrix."""
    processes = Processes.join()
    found = [of_tiny(*pair, processes) for pair in methods]
    processes.leave()
    return found


def of_tiny(method: str, family: str, processes: Processes = ALONE) -> list[Tensor]:
    """Return what one of them answers."""
    from tests.methods.matrix import answers, case

    found = case(method, family)
    result = compress(found.example.copied(), found.recipe, samples=found.example.calls, measures=(), processes=processes)
    with policies.on(result.network, result.policies), cache_dequantized(result.network.module):
        return answers(result.network, found.example.calls)


def killed(desk: Path, folder: Path, name: str, dying: int) -> str:
    """Start a run in which one process kills itself at the second block; returns what the other says."""
    processes = Processes.join()

    def tell(event: Event) -> None:
        if (event.stage, event.done, processes.rank) == ("compress", 1, dying) and event.what:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        compress(desk / "model", {"steps": RECIPES[name]}, output=folder, tell=tell, processes=processes, **options(desk))
    except AerogelError as error:
        return str(error)
    return "it ended"


def resumed(desk: Path, folder: Path, name: str) -> list[str]:
    """Resume that run; returns the blocks that were still to do."""
    processes, seen = Processes.join(), list[Event]()
    recipe = {"steps": RECIPES[name]}
    compress(desk / "model", recipe, output=folder, resume=True, tell=seen.append, processes=processes, **options(desk))
    processes.leave()
    return [event.what for event in seen if event.stage == "compress" and event.what]


def failing(arguments: list[str], error: Exception) -> int:
    """Run a command line that fails in the second process alone, in the middle of a block; returns its exit code."""
    finish = Gptq._store

    def store(method: Gptq, block: Block, *given: Any) -> None:
        if os.environ["RANK"] == "1" and block.position == 1:
            raise error
        finish(method, block, *given)

    Gptq._store = store  # type: ignore[method-assign]
    return run_command(arguments)


def run_command(arguments: list[str]) -> int:
    """Run a command line; returns its exit code."""
    sys.argv = ["aerogel", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0
