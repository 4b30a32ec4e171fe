"""What reuse saves in time at DiT-XL/2's shape, beside what multiply-accumulates promise; writes benchmarks/results/caching_speed.json.

python benchmarks/caching_speed.py                   # float and W8A8, 4 steps, variants in turns: 10 minutes on two threads
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from results import write
from torch import Tensor

import aerogel
from aerogel.model.calls import Call
from aerogel.model.load import load
from aerogel.model.network import Network
from aerogel.model.reuse import Schedule, reusing, slot_bytes
from aerogel.model.units import Costs, costs_of, units_of

STEPS, SEED = (999.0, 749.0, 499.0, 249.0), 0
COLUMNS = [
    "weights and inputs",
    "schedule",
    "slots reused",
    "MACs, times fewer",
    "seconds a run",
    "times faster",
    "of what MACs promise",
    "slots' MB",
]
NOTES = [
    "Random weights, gates that are not zero; both branches of guidance in one batch; a run is all steps of the denoiser and nothing else.",
    "Variants take turns in one process; times faster are medians of ratios within a round, to the same network without reuse.",
    "Promised: multiply-accumulates of a run over those left, with all that is never reused in both.",
    "Target: at least 0.9 of what multiply-accumulates promise.",
]  # fmt: skip


def network(quantized: bool) -> Network:
    """DiT-XL/2 in bfloat16, as it is or with 8-bit weights and static 8-bit inputs."""
    torch.manual_seed(SEED)
    made = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2
    )
    made = made.eval().requires_grad_(False).bfloat16()
    if not quantized:
        return load(made)
    steps = [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"ranges": {"start": "minmax", "steps": 0}}]
    return aerogel.compress(made, {"steps": steps}, samples=[call(STEPS[0], 8)], measures=()).network


def call(step: float, batch: int) -> Call:
    """A step of so many samples, half of them without a class."""
    generator = torch.Generator().manual_seed(int(step))
    given = {
        "hidden_states": torch.randn(batch, 4, 32, 32, generator=generator).bfloat16(),
        "timestep": torch.full((batch,), int(step)),
        "class_labels": torch.tensor([1, 1000] * (batch // 2)),
    }
    return Call((), given)


def schedules(units: list[str]) -> dict[str, Tensor]:
    """Which units run (T, N)."""
    computed_TN = torch.ones(len(STEPS), len(units), dtype=torch.bool)
    whole, attention, random = (computed_TN.clone() for _ in range(3))
    whole[1::2] = False
    attention[1:, [place for place, name in enumerate(units) if "attn" in name]] = False
    generator = torch.Generator().manual_seed(SEED)
    free = computed_TN[1:].nonzero() + torch.tensor([1, 0])
    for step, unit in free[torch.randperm(len(free), generator=generator)[: round(0.4 * computed_TN.numel())]].tolist():
        random[step, unit] = False
    return {"every second step": whole, "attention at the first step only": attention, "40 % of the slots at random": random}


def promised(computed_TN: Tensor, costs: Costs) -> float:
    """How many times fewer multiply-accumulates."""
    left = (computed_TN.double() * torch.tensor(costs.unit_macs)).sum() + len(STEPS) * costs.fixed
    return len(STEPS) * costs.macs / float(left)


def turn(made: Network, given: list[Call], on: Callable[[], AbstractContextManager[Any]]) -> float:
    """Seconds of a run."""
    with on():
        start = time.perf_counter()
        for one in given:
            made.run(one)
        return time.perf_counter() - start


def measure(label: str, made: Network, given: list[Call], rounds: int) -> list[list[Any]]:
    """A row for each schedule of one network."""
    units, costs = list(units_of(made)), costs_of(made, given[0])
    plans = {name: Schedule(STEPS, "", tuple(units), table) for name, table in schedules(units).items()}
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"none": nullcontext}
    ways |= {name: partial(reusing, made, plan) for name, plan in plans.items()}
    turn(made, given[:1], nullcontext)  # packs weights and tries kernels
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, on in ways.items():
            seconds[name].append(turn(made, given, on))
    rows = []
    for name, taken in seconds.items():
        faster = statistics.median(a / b for a, b in zip(seconds["none"], taken, strict=True))
        plan = plans.get(name)
        fewer = promised(plan.computed_TN, costs) if plan else 1.0
        held = slot_bytes(plan, costs.unit_bytes) / 2**20 if plan else 0.0
        rows.append([label, name, plan.reused if plan else 0.0, fewer, statistics.median(taken), faster, faster / fewer, held])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="Samples at once, both branches of guidance.")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    given = [call(step, asked.batch) for step in STEPS]
    rows = [row for label, made in (("bfloat16", False), ("W8A8", True)) for row in measure(label, network(made), given, asked.rounds)]
    settings = {
        "shape": "DiT-XL/2, 256 tokens", "batch": asked.batch, "steps": len(STEPS), "seed": SEED, "rounds": asked.rounds,
        "threads": asked.threads,
    }  # fmt: skip
    write("caching_speed", "Time that reuse saves", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
