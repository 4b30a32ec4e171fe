"""What training a router of reuse takes and what its schedule costs, harmonica beside l2c; writes benchmarks/results/router_training.json.

python benchmarks/router_training.py                              # 30 trainings of 200 trajectories: hours on one thread
python benchmarks/router_training.py --trajectories 4 --seeds 0   # for development; nothing is written
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from caching import DIT, GUIDANCE, HELD, UNSEEN
from memory import status
from results import FOLDER, write
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.replay import Replay, output_of, replays

STEPS, TRAJECTORIES, REFRESH = 10, 200, 50
IMAGES, BATCH = 32, 4
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "harmonica": ("harmonica", {}),
    "harmonica, proxy none": ("harmonica", {"proxy": "none"}),
    "l2c": ("l2c", {}),
    "l2c, penalty 3e-4": ("l2c", {"penalty": 3e-4}),
    "l2c, penalty 1e-3": ("l2c", {"penalty": 1e-3}),
}
COLUMNS = [
    "router",
    "cache ratio",
    "trajectories",
    "denoiser calls",
    "clean images read",
    "processor seconds",
    "peak MB",
    "of it before training",
    "error of x0",
    "seeds: min to max",
]
NOTES = [
    "Equal numbers of trajectories. l2c has no trajectories and runs as many iterations as these have steps.",
    "Denoiser calls: all forward passes, including those that verify the replay and measure the log and the proxy.",
    "Clean images: images that are noised, including repetitions; here the final latents of the recorded images.",
    "l2c uses the published penalty, which was chosen for a larger model. harmonica adjusts its penalty to the budget.",
    "Error: mean squared distance between final images of held-out noise and those of the same denoiser without a cache.",
    "Each training runs in a separate process; the peak is its resident memory. Values are medians over seeds.",
]  # fmt: skip


def step_of(router: str, ratio: float, trajectories: int) -> dict[str, Any]:
    """The recipe's step of a router."""
    method, options = ROUTERS[router]
    length = {"iterations": trajectories * STEPS, "check": REFRESH * STEPS}
    if method == "harmonica":
        length = {"trajectories": trajectories, "refresh": REFRESH}
    return {method: {"ratio": ratio, **length, **options}}


def recorded(network: Network, count: int, batch: int, seed: int) -> list[Call]:
    """The calls of some generations."""
    wanted = Denoising(count=count, steps=STEPS, guidance=GUIDANCE, batch=batch)
    return record(network.processor, network.module, wanted, seed)


def train_here(step: dict[str, Any], seed: int) -> dict[str, float]:
    """Train in this process and measure: what it took first, the error afterwards."""
    network: Network = aerogel.load(DIT, lazy=False)
    calls, forwards = recorded(network, IMAGES, BATCH, 0), 0
    (method,) = (one.method for one in Recipe.parse({"steps": [step]}).steps)

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = network.module.register_forward_pre_hook(count)
    torch.manual_seed(seed)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status("VmRSS"), time.process_time()
    state = method.calibrate(network, calls)
    taken, peak = time.process_time() - start, status("VmHWM")
    hook.remove()
    (unseen,) = replays(network, Trajectories.of(network, recorded(network, HELD, HELD, UNSEEN)))
    exact = final(network, unseen)
    with method.on(network, state):
        error = float((final(network, unseen) - exact).square().mean())
    read = getattr(state, "images", 0)
    return {"calls": forwards, "images": read, "seconds": taken, "peak": peak / 1e6, "before": before / 1e6, "error": error}


def final(network: Network, run: Replay) -> Tensor:
    """The final images of a recorded generation."""
    return run.finish(run.start(), lambda _, call: output_of(network.run(call)))


def train_apart(step: dict[str, Any], seed: int, threads: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--step", json.dumps(step), "--seeds", str(seed), "--threads", str(threads)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def measure(routers: list[str], ratios: list[float], trajectories: int, seeds: list[int], threads: int) -> None:
    """A row for each router and ratio, the median of the seeds."""
    rows: list[list[Any]] = []
    for router in routers:
        for ratio in ratios:
            step = step_of(router, ratio, trajectories)
            found = [train_apart(step, seed, threads) for seed in seeds]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            counts = [round(middle[key]) for key in ("calls", "images", "seconds", "peak", "before")]
            errors = [one["error"] for one in found]
            spread = f"{len(errors)}: {min(errors):.2g} to {max(errors):.2g}"
            rows.append([router, ratio, trajectories, *counts, middle["error"], spread])
            print(rows[-1], flush=True)
            if trajectories == TRAJECTORIES:
                save(rows, threads)


def save(rows: list[list[Any]], threads: int) -> None:
    """Put rows into the results, beside those of other routers and ratios."""
    path = FOLDER / "router_training.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row[:2] not in [new[:2] for new in rows]]
    settings = {
        "model": "zoo/fashion-dit, 12 cached modules", "steps": STEPS, "guidance": GUIDANCE, "recorded images": IMAGES, "at once": BATCH,
        "held-out images": HELD, "threads": threads,
    }  # fmt: skip
    title = "Training a caching router"
    write(path.stem, title, settings, COLUMNS, sorted(kept + rows, key=lambda row: (row[1], list(ROUTERS).index(row[0]))), NOTES)


def main() -> None:
    """Measure all, or (as a child) one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", nargs="+", choices=list(ROUTERS), default=list(ROUTERS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--trajectories", type=int, default=TRAJECTORIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        torch.set_num_threads(given.threads)
        print(json.dumps(train_here(given.step, given.seeds[0])))
        return
    measure(given.routers, given.ratios, given.trajectories, given.seeds, given.threads)


if __name__ == "__main__":
    main()
