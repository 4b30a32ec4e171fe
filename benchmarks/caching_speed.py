"""What reuse saves in time at DiT-XL/2's shape, beside what multiply-accumulates promise; writes benchmarks/results/caching_speed.json.

python benchmarks/caching_speed.py                   # float and W8A8, 4 steps, variants in turns: 15 minutes on two threads
python benchmarks/caching_speed.py --tiny            # a small network, one round, nothing is written: whether it runs

cache-dit's rows are there where it is installed, which it can be beside our versions: pip install -c constraints.txt cache-dit==1.5.*
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from diffusers import CacheMixin, DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from results import write
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.methods.feature_cache.delta_dit import DeltaDit
from aerogel.methods.feature_cache.first_block import FirstBlock
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.model.calls import Call
from aerogel.model.hooks import patch_forward
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import Costs, cached_modules_of, costs_of
from aerogel.runtime.feature_cache.schedule import Schedule, caching

STEPS, SEED = (999.0, 749.0, 499.0, 249.0), 0
THRESHOLD = 0.35
"""What the first block adds differs by 0.17 to 0.19 between two steps of the same latents, by 0.63 between latents."""
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
TINY = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "sample_size": 8}
COLUMNS = [
    "weights and inputs",
    "implementation",
    "skipped",
    "full steps",
    "share of modules skipped",
    "MACs, reduction",
    "seconds per run",
    "speed-up",
    "share of the MAC reduction",
    "cache MB",
]
NOTES = [
    "Random weights, non-zero gates; both guidance branches in one batch. A run is all steps of the denoiser and nothing else.",
    (
        "Variants alternate in one process on one denoiser. Speed-ups are medians of ratios within a round, relative "
        "to the denoiser without a cache."
    ),
    (
        "Computed modules (attention, FFN) are counted by hooks. MAC reduction: MACs of a run over the remaining MACs, "
        "including all other layers."
    ),
    "Latents change at every second step, so that all threshold policies skip the same blocks at the same steps (checked).",
    f"By threshold: {THRESHOLD} in first_block, FirstBlockCache and DBCache (F1B0). Every second step: delta_dit, DBCache's static mask.",
    "Target: at least 0.9 of the MAC reduction.",
]  # fmt: skip

Way = tuple[str, str]
"""By whom, and what is left out."""
On = Callable[[], AbstractContextManager[Any]]
NONE: Way = ("", "nothing")


def network(shape: Mapping[str, int], batch: int, quantized: bool) -> Network:
    """DiT in bfloat16, as it is or with 8-bit weights and static 8-bit inputs."""
    torch.manual_seed(SEED)
    made = DiTTransformer2DModel(in_channels=4, out_channels=8, patch_size=2, **shape)
    made = made.eval().requires_grad_(False).bfloat16()
    if not quantized:
        return open_model(made)
    steps = [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"activation_ranges": {"start": "minmax", "steps": 0}}]
    return aerogel.compress(made, {"steps": steps}, samples=calls(shape, batch)[:1], measures=()).network


def calls(shape: Mapping[str, int], batch: int) -> list[Call]:
    """The steps of so many samples, half of them without a class; two steps in a row have the same latents."""
    made = []
    for number, step in enumerate(STEPS):
        generator = torch.Generator().manual_seed(SEED + number // 2)
        given = {
            "hidden_states": torch.randn(batch, 4, shape["sample_size"], shape["sample_size"], generator=generator).bfloat16(),
            "timestep": torch.full((batch,), int(step)),
            "class_labels": torch.tensor([1, 1000] * (batch // 2)),
        }
        made.append(Call((), given))
    return made


def schedules(modules: list[str]) -> dict[str, Tensor]:
    """Return which modules run (T, N)."""
    computed_TN = torch.ones(len(STEPS), len(modules), dtype=torch.bool)
    whole, attention, random = (computed_TN.clone() for _ in range(3))
    whole[1::2] = False
    attention[1:, [place for place, name in enumerate(modules) if "attn" in name]] = False
    generator = torch.Generator().manual_seed(SEED)
    free = computed_TN[1:].nonzero() + torch.tensor([1, 0])
    for step, module in free[torch.randperm(len(free), generator=generator)[: round(0.4 * computed_TN.numel())]].tolist():
        random[step, module] = False
    return {
        "all modules, every second step": whole,
        "attention after the first step": attention,
        "40 % of modules and steps, at random": random,
    }


def modules(made: Network) -> dict[Way, On]:
    """Ways to skip modules."""
    names = list(cached_modules_of(made))
    plans = {name: Schedule(STEPS, "", tuple(names), table) for name, table in schedules(names).items()}
    return {("Aerogel", name): partial(caching, made, plan) for name, plan in plans.items()}


def blocks_by_threshold(made: Network, given: list[Call]) -> dict[Way, On]:
    """Ways to leave out all blocks but the first where that one has changed little."""
    out = "blocks after the first, by threshold"
    ways: dict[Way, On] = {
        ("Aerogel", out): policy_on(made, FirstBlock(THRESHOLD), given),
        ("diffusers", out): partial(first_block_cache, made.module),
    }
    if cache_dit_is_here():
        ways["cache-dit", out] = partial(db_cache, made.module, residual_diff_threshold=THRESHOLD, max_warmup_steps=1)
    return ways


def blocks_by_mask(made: Network, given: list[Call]) -> dict[Way, On]:
    """Ways to leave out all blocks but the first at every second step, which is said beforehand."""
    out = "blocks after the first, every second step"
    every_second = DeltaDit(interval=2, share=1 - 1 / len(made.blocks()), boundary=1.0)
    ways: dict[Way, On] = {("Aerogel", out): policy_on(made, every_second, given)}
    if cache_dit_is_here():
        mask = [int(step % 2 == 0) for step in range(len(STEPS))]
        config = {"steps_computation_mask": mask, "steps_computation_policy": "static", "max_warmup_steps": 0}
        ways["cache-dit", out] = partial(db_cache, made.module, **config)
    return ways


def policy_on(made: Network, policy: FeatureCachePolicy, given: list[Call]) -> On:
    """Put one of our policies on."""
    return partial(policy.on, made, policy.calibrate(made, given))


@contextmanager
def first_block_cache(module: nn.Module) -> Iterator[None]:
    """diffusers' own, which the class of DiT does not offer but the blocks take."""
    with restored(module):
        apply_first_block_cache(module, FirstBlockCacheConfig(threshold=THRESHOLD))
        with CacheMixin.cache_context(module, "both branches"):
            yield


@contextmanager
def db_cache(module: nn.Module, **config: Any) -> Iterator[None]:
    """cache-dit's, with one block at the start that always runs, which is the least it takes."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it reads that when it is imported
    import cache_dit

    with restored(module):
        wanted = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "num_inference_steps": len(STEPS)}
        cache_dit.enable_cache(module, cache_config=cache_dit.DBCacheConfig(**wanted, **config))
        try:
            yield
        finally:
            cache_dit.disable_cache(module)  # lets go of what it kept


def cache_dit_is_here() -> bool:
    """Whether cache-dit is installed."""
    return importlib.util.find_spec("cache_dit") is not None


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Undo what others leave on modules after they are taken off: forwards, registries, modules by a second name."""
    before = {part: (dict(vars(part)), dict(part._modules)) for part in module.modules()}
    try:
        yield
    finally:
        for part, (own, children) in before.items():
            vars(part).clear()
            vars(part).update(own)
            part._modules.clear()
            part._modules.update(children)


@dataclass(frozen=True)
class Counted:
    """What happened in a run."""

    ran_TN: Tensor
    """Return which module ran at which step."""
    kept: float | None
    """Bytes between two steps; None where nobody says."""

    @property
    def whole(self) -> int:
        """Steps at which all modules ran."""
        return int(self.ran_TN.all(1).sum())

    def fewer(self, costs: Costs) -> float:
        """How many times fewer multiply-accumulates."""
        left = (self.ran_TN.double() * torch.tensor(costs.module_macs)).sum() + len(STEPS) * costs.fixed
        return len(STEPS) * costs.macs / float(left)


def count(made: Network, given: list[Call], on: On) -> Counted:
    """Run once and see from within the modules which of them run; packs weights and tries kernels too."""
    names, find = list(cached_modules_of(made)), made.module.get_submodule
    ran: set[str] = set()

    def seen(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ran.add(name)
        return own(*args, **kwargs)

    table = []
    with patch_forward({find(name): partial(seen, name, find(name).forward) for name in names}), on() as follows:
        for one in given:
            ran.clear()
            made.run(one)
            table.append([name in ran for name in names])
    return Counted(torch.tensor(table), getattr(follows, "peak_bytes", None))


def turn(made: Network, given: list[Call], on: On) -> float:
    """Seconds of a run."""
    with on():
        start = time.perf_counter()
        for one in given:
            made.run(one)
        return time.perf_counter() - start


def measure(label: str, made: Network, given: list[Call], rounds: int) -> list[list[Any]]:
    """A row for each way of one network."""
    costs, blocks = costs_of(made, given[0]), blocks_by_threshold(made, given) | blocks_by_mask(made, given)
    ways: dict[Way, On] = {NONE: nullcontext, **modules(made), **blocks}
    counted = {way: count(made, given, on) for way, on in ways.items()}
    wanted_TN = torch.ones_like(counted[NONE].ran_TN)
    wanted_TN[1::2, 2:] = False  # a block is two modules
    for way in blocks:
        if not torch.equal(counted[way].ran_TN, wanted_TN):
            raise SystemExit(f"{label}, {', '.join(way)}: other blocks or steps than every second are left out, which is not the same work")
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, on in ways.items():
            seconds[way].append(turn(made, given, on))
    rows = []
    for way, taken in seconds.items():
        found = counted[way]
        faster = statistics.median(a / b for a, b in zip(seconds[NONE], taken, strict=True))
        fewer, out = found.fewer(costs), 1 - float(found.ran_TN.float().mean())
        kept = None if found.kept is None else found.kept / 2**20
        rows.append([label, *way, found.whole, out, fewer, statistics.median(taken), faster, faster / fewer, kept])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="Samples at once, both branches of guidance.")
    parser.add_argument("--tiny", action="store_true", help="A small network and one round; writes nothing.")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not cache_dit_is_here():
        print("without cache-dit's rows: it is not installed here (pip install cache-dit==1.5.*)", flush=True)
    shape, rounds = (TINY, 1) if asked.tiny else (XL, asked.rounds)
    given, rows = calls(shape, asked.batch), []
    for label, quantized in (("bfloat16", False), ("W8A8", True)):
        rows += measure(label, network(shape, asked.batch, quantized), given, rounds)
    if asked.tiny:
        return
    settings = {
        "shape": "DiT-XL/2, 256 tokens", "batch": asked.batch, "steps": len(STEPS), "seed": SEED, "rounds": rounds,
        "threads": asked.threads, "diffusers": version("diffusers"),
        **({"cache-dit": version("cache-dit")} if cache_dit_is_here() else {}),
    }  # fmt: skip
    write("caching_speed", "Speed-up of feature caching", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
