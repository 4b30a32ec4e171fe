"""What reuse costs the zoo's DiT in its final images, policy beside policy at equal cache ratios; writes benchmarks/results/caching.json.

python benchmarks/caching.py                         # 10 steps, all ratios and policies: hours on one thread; rows are written as they come
python benchmarks/caching.py --only "harmonica and local search" --ratios 0.3 --seeds 0
python benchmarks/caching.py --steps 20 --only harmonica --ratios 0.2 0.3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, write
from torch import Tensor

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, operations
from aerogel.runtime.feature_cache.replay import Replay, output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState
from aerogel.runtime.feature_cache.streams import FeatureCacheState

DIT = Path(__file__).parents[1] / "zoo" / "fashion-dit"
GUIDANCE, HELD, UNSEEN, TRIALS = 1.5, 64, 99, 1200
LEFT_OUT: list[tuple[str, str, tuple[float, ...]]] = [
    ("first_block", "threshold", (0.2, 0.3, 0.4)),
    ("teacache", "threshold", (0.2, 0.3, 0.4)),
    ("magcache", "threshold", (0.12, 0.24, 0.4)),
    ("delta_dit", "interval", (2, 3)),
    ("toca", "interval", (2, 3)),
    ("duca", "interval", (2, 3)),
]
"""Policies without a budget, brought to some shares of reuse."""
FEWER = (0.8, 0.7, 0.6, 0.5)
"""Shares of the steps that the whole network is given instead."""
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)
COLUMNS = [
    "steps",
    "policy",
    "cache ratio",
    "operations, reduction",
    "cache KB an image",
    "error of x0",
    "relative to even spacing",
    "seeds: min to max",
    "processor seconds to calibrate",
]
NOTES = [
    "Error: mean squared distance between final images of held-out noise and those of the same denoiser without a cache (variance below).",
    (
        "Operations are counted while the held-out images are generated. The cache ratios of toca and duca count "
        "partly recomputed modules as cached."
    ),
    "Block-range policies (first_block, teacache, magcache, delta_dit): the cache ratio is the share of steps at which a range is skipped.",
    (
        "Policies with a ratio meet it exactly. For the others the ratio is what the rule gives, compared with even "
        "spacing interpolated between ratios."
    ),
    "Trained and searched rows are the median, minimum and maximum over seeds. Searches used 32 images of other noise.",
    f"Searches take up to {TRIALS} trials and end where no exchange helps.",
    (
        "At 20 steps: fixed rules, and the router alone at 0.2 and 0.3. At 50 steps: fixed rules only. The other runs "
        "take hours of training and were not made."
    ),
    "Target: harmonica alone at most a third of the error of even spacing at 0.2 and 0.3; with local search the best row at every ratio.",
]  # fmt: skip


def budgeted(ratios: list[float], steps: int) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Label, ratio and step of what meets a ratio; what is trained is trained for each seed, at most 10 steps with a search behind it."""
    for ratio in ratios:
        yield "uniform_cache", ratio, {"uniform_cache": {"ratio": ratio}}
        if ratio < 0.7:
            yield "uniform_cache, from the fourth step", ratio, {"uniform_cache": {"ratio": ratio, "first": 3}}
        yield "random entries", ratio, {}
        if steps > 10:
            yield "harmonica", ratio, {"harmonica": {"ratio": ratio}}
        else:  # the router's own schedule is measured too
            yield "harmonica and local search", ratio, {"harmonica": {"ratio": ratio, "search": TRIALS}}
        yield "schedule_search", ratio, {"schedule_search": {"ratio": ratio, "trials": TRIALS}}
        for penalty in (1e-6, 1e-3) if ratio <= 0.5 else ():
            yield f"l2c, penalty {penalty}", ratio, {"l2c": {"ratio": ratio, "penalty": penalty}}


def ruled() -> Iterator[tuple[str, float | None, dict[str, Any]]]:
    """Label, nothing and step of what stands where its rule puts it."""
    for interval in (2, 3):
        yield f"fora, every {interval}", None, {"fora": {"interval": interval}}
    for interval in (2, 3):
        for order in (1, 2):
            yield f"taylorseer, every {interval}, order {order}", None, {"taylorseer": {"interval": interval, "order": order}}
    for alpha in (0.08, 0.18, 0.35):
        yield f"smoothcache, {alpha}", None, {"smoothcache": {"alpha": alpha}}
    yield "pab", None, {"pab": {}}
    for fewer in FEWER:
        yield f"fewer steps, {fewer:.0%}", None, {"fewer steps": fewer}
    for method, option, values in LEFT_OUT:
        for value in values:
            yield f"{method}, {option} {value}", None, {method: {option: value}}
    yield "fastercache", None, {"fastercache": {}}


class Bench:
    """The network, what it is calibrated on and what it is held against."""

    def __init__(self, steps: int) -> None:
        self.network: Network = aerogel.load(DIT, lazy=False)
        self.steps = steps
        self.few = self._recorded(steps, 32, 0, batch=4)
        (self.unseen,) = replays(self.network, Trajectories.of(self.network, self._recorded(steps, HELD, UNSEEN)))
        with operations() as whole:
            self.exact = self._images(self.unseen)
        self.macs = whole.get_total_flops()

    @cache  # noqa: B019 - one bench a number of steps, which lasts as long as the run
    def _recorded(self, steps: int, count: int, seed: int, batch: int | None = None) -> list[Call]:
        wanted = Denoising(count=count, steps=steps, guidance=GUIDANCE, batch=batch or count)
        return record(self.network.processor, self.network.module, wanted, seed)

    def _images(self, run: Replay) -> Tensor:
        return run.finish(run.start(), lambda _, call: output_of(self.network.run(call)))

    def random(self, ratio: float, seed: int) -> ScheduleState:
        """The state of a schedule that reuses any cache entries behind the first step."""
        generator = torch.Generator().manual_seed(seed)
        modules = tuple(cached_modules_of(self.network))
        computed_TN = torch.ones(len(self.unseen.calls), len(modules), dtype=torch.bool)
        free = computed_TN[1:].nonzero() + torch.tensor([1, 0])
        for step, module in free[torch.randperm(len(free), generator=generator)[: round(ratio * computed_TN.numel())]].tolist():
            computed_TN[step, module] = False
        return Schedule(self.unseen.steps, "", modules, computed_TN).as_state()

    def fewer(self, share: float) -> dict[str, float]:
        """The whole network with fewer steps, from the same noise."""
        (run,) = replays(self.network, Trajectories.of(self.network, self._recorded(round(share * len(self.unseen.calls)), HELD, UNSEEN)))
        with operations() as left:
            error = float((self._images(run) - self.exact).square().mean())
        return {"reused": round(1 - share, 6), "macs": self.macs / left.get_total_flops(), "kb": 0.0, "error": error, "s": 0.0}

    def judge(self, label: str, step: dict[str, Any], ratio: float | None, seed: int) -> dict[str, dict[str, Any]]:
        """Calibrate once and measure, by label: where a search is behind a router, the router's own schedule is measured too."""
        if "fewer steps" in step:
            return {label: self.fewer(step["fewer steps"])}
        (method,) = (one.method for one in Recipe.parse({"steps": [step or {"uniform_cache": {"ratio": ratio}}]}).steps)
        torch.manual_seed(seed)
        start = time.process_time()
        trained = "harmonica" in step or "l2c" in step
        calls = self.few if trained else self._recorded(self.steps, 32, seed)
        state = method.calibrate(self.network, calls) if step else self.random(ratio or 0, seed)
        taken = time.process_time() - start
        found = {label: self._measured(method, state, taken)}
        if getattr(state, "decoded", None):
            found["harmonica"] = self._measured(method, replace(state, computed=state.decoded), None)
        return found

    def _measured(self, method: Any, state: FeatureCacheState, taken: float | None) -> dict[str, Any]:
        with method.on(self.network, state) as reuse, operations() as left:
            error = float((self._images(self.unseen) - self.exact).square().mean())
        out = [range_ is not None for _, range_ in getattr(reuse, "decisions", [])]
        held = reuse.peak_bytes / len(self.exact) / 1024
        return {
            "reused": round(Schedule.of(self.network, state).reused if isinstance(state, ScheduleState) else sum(out) / len(out), 6),
            "macs": self.macs / left.get_total_flops(),
            "kb": held,
            "error": error,
            "s": taken,
        }


def even(found: list[list[Any]], steps: int, reused: float) -> float | None:
    """What even spacing costs at this ratio, between the two measured ratios beside it."""
    points = sorted((row[2], row[5]) for row in found if row[0] == steps and row[1] == "uniform_cache")
    for (low, below), (high, above) in pairwise(points):
        if low - 1e-9 <= reused <= high + 1e-9:
            return below + (above - below) * (reused - low) / (high - low)
    return None


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="Rows whose label is one of these, but for what stands behind a comma.")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for steps in given.steps:
        bench = Bench(steps)
        settings = {
            "model": "zoo/fashion-dit, 12 cached modules", "guidance": GUIDANCE,
            "sampler": type(bench.network.processor.scheduler).__name__,
            "held-out images": HELD, "threads": given.threads, "variance": round(float(bench.exact.var()), 4),
        }  # fmt: skip
        for label, ratio, step in chain(budgeted(given.ratios, steps), ruled()):
            if given.only and label not in given.only and label.partition(",")[0] not in given.only:
                continue
            anew = not step or not {"harmonica", "l2c", "schedule_search"}.isdisjoint(step)
            judged = [bench.judge(label, step, ratio, seed) for seed in (given.seeds if anew else [0])]
            for name in judged[0]:
                row = [steps, name, *summary([one[name] for one in judged])]
                print(row, flush=True)
                keep(row, settings)


def summary(judged: list[dict[str, Any]]) -> list[Any]:
    """The median of all seeds, and how far they lie apart."""
    errors = [one["error"] for one in judged]
    spread = f"{len(errors)}: {min(errors):.2g} to {max(errors):.2g}" if len(errors) > 1 else "1"
    medians = [statistics.median(one[key] for one in judged) for key in ("reused", "macs", "kb", "error")]
    return [*medians, None, spread, None if judged[0]["s"] is None else statistics.median(one["s"] for one in judged)]


def keep(row: list[Any], settings: dict[str, Any]) -> None:
    """Write a row among those that are there, and what all are of even spacing."""
    path = FOLDER / "caching.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [*(old for old in before if old[:2] != row[:2] or abs(old[2] - row[2]) > 1e-6), row]
    for one in kept:
        spaced = even(kept, one[0], one[2])
        one[6] = None if spaced is None else one[5] / spaced
    kept.sort(key=lambda one: (one[0], one[2], one[5]))
    write(path.stem, "Feature caching in a DiT: error of the final image", settings, COLUMNS, kept, NOTES)


if __name__ == "__main__":
    main()
