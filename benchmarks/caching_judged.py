"""How judges see the zoo's DiT at 1.5 times fewer operations, reuse beside fewer steps; writes benchmarks/results/caching_judged.json.

python benchmarks/caching_judged.py                 # 10 steps, three seeds: about an hour on one thread
python benchmarks/caching_judged.py --steps 20 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from caching import DIT, GUIDANCE, TRIALS
from diffusion_quality import figures
from results import FOLDER, write

import aerogel
from aerogel.data.denoising import Denoising, ImageBatch, generate_images, record
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.cached_modules import operations

SPEEDUP, NOISE, BATCH = 1.5, 500, 100
BY_MACS = {"target_speedup": SPEEDUP, "by": "macs"}
POLICIES: dict[str, dict[str, Any]] = {
    "harmonica and local search": {"harmonica": BY_MACS | {"search": TRIALS}},
    "harmonica": {"harmonica": BY_MACS},
    "schedule_search": {"schedule_search": BY_MACS | {"trials": TRIALS}},
    "smoothcache, 0.18": {"smoothcache": {"alpha": 0.18}},
    "fora, every 2": {"fora": {"interval": 2}},
}
COLUMNS = [
    "steps",
    "policy",
    "operations, reduction",
    "MSE to uncached",
    "frechet[fashion-judge]",
    "relative to uncached",
    "frechet[efficientnet-lite0@128]",
    "relative to uncached ",
    "accuracy[fashion-judge]",
]
NOTES = [
    "Fréchet distances between generated and real images, with the same number of images and the same noise in all rows.",
    "Operations are counted while images are generated. Trained policies: the median over seeds. Budgets are in multiply-accumulates.",
    "Target: distances at most 5 % above those without a cache.",
]


def made(network: Network, steps: int, count: int) -> tuple[ImageBatch, float]:
    """Images and the operations that they took."""
    with operations() as counted:
        some = list(generate_images(network.processor, Denoising(count, steps, GUIDANCE, batch=BATCH), NOISE))
    return ImageBatch(
        torch.cat([one.images_NCHW for one in some]), tuple(name for one in some for name in one.subjects)
    ), counted.get_total_flops()


class Bench:
    """What rows are held against."""

    def __init__(self, steps: int, count: int) -> None:
        self.network: Network = aerogel.load(DIT, lazy=False)
        self.steps, self.count = steps, count
        self.plain, self.macs = made(self.network, steps, count)
        self.figures = figures(self.plain, self.plain)

    def row(self, policy: str, seeds: list[int]) -> list[Any]:
        """Calibrate, make images, look at them."""
        (method,) = (one.method for one in Recipe.parse({"steps": [POLICIES[policy]]}).steps)
        found = []
        for seed in seeds if {"harmonica", "schedule_search"} & set(POLICIES[policy]) else [0]:
            batch = 4 if "harmonica" in POLICIES[policy] else 32
            wanted = Denoising(32, self.steps, GUIDANCE, batch=batch)
            calls = record(self.network.processor, self.network.module, wanted, seed)
            torch.manual_seed(seed)
            with method.on(self.network, method.calibrate(self.network, calls)):
                found.append(self._seen(*made(self.network, self.steps, self.count)))
        return [self.steps, policy, *(statistics.median(column) for column in zip(*found, strict=True))]

    def without(self) -> list[Any]:
        """The row without reuse."""
        return [self.steps, "uncached", *self._seen(self.plain, self.macs)]

    def fewer(self) -> list[Any]:
        """The row of the whole network with fewer steps."""
        steps = round(self.steps / SPEEDUP)
        return [self.steps, f"{steps} steps", *self._seen(*made(self.network, steps, self.count))]

    def _seen(self, these: ImageBatch, macs: float) -> list[float]:
        ours = self.figures if these is self.plain else figures(these, self.plain)
        cells = [self.macs / macs, ours.get("mse", 0.0)]
        for judge in ("fashion-judge", "efficientnet-lite0@128"):
            cells += [ours[f"frechet[{judge}]"], ours[f"frechet[{judge}]"] / self.figures[f"frechet[{judge}]"]]
        return [*cells, ours["accuracy[fashion-judge]"]]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Bench(given.steps, given.images)
    settings = {"model": "zoo/fashion-dit", "guidance": GUIDANCE, "images": given.images, "seeds": given.seeds, "trials": TRIALS}
    path = FOLDER / "caching_judged.json"
    for make in (bench.without, bench.fewer, *((lambda policy=policy: bench.row(policy, given.seeds)) for policy in given.only)):
        row = make()
        print(row, flush=True)
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = sorted([*(old for old in before if old[:2] != row[:2]), row], key=lambda one: (one[0], one[2]))
        write(path.stem, f"Images at {SPEEDUP} times fewer operations, as judges see them", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
