"""What zeros cost: how they are chosen, how they are shared out, what is adjusted afterwards, and 4 bits beside them.

    python benchmarks/sparsity.py --table criteria [--shares 0.5 2:4] [--seeds 0 1 2]     # SmolLM2-135M
    python benchmarks/sparsity.py --table allocation | reconstruction | joint
    python benchmarks/sparsity.py --model fashion-judge | fashion-unet | fashion-dit [--full] [--minutes 15]

Each table is a file of its own in results/. What is there already under the same settings is not measured again, so that a run that was
stopped goes on and parts can run at different times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sparsity_models
import torch
from results import FOLDER, write

import aerogel
from aerogel.engine.calibration import Samples
from aerogel.evaluate.perplexity import Perplexity
from aerogel.numerics.sparsity import zero_share

MODEL = "smollm2-135m"
PERPLEXITY = Perplexity(tokens=8192, stride=511, length=512)
COLUMNS = ["zeros asked for", "steps", "zeros", "perplexity", "nats lost", "by seed", "seconds"]
Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A row: a share or a pattern of zeros, and the steps that make them."""

    share: str
    steps: Steps

    @property
    def name(self) -> str:
        """The steps with what was set of their options, other than the share."""
        return ", then ".join(f"{name}{_options(values)}" for step in self.steps for name, values in step.items())


def _options(values: dict[str, Any]) -> str:
    said = [f"{key} {value}" for key, value in values.items() if key not in ("sparsity", "pattern")]
    return f" ({', '.join(said)})" if said else ""


def zeros(share: str) -> dict[str, Any]:
    """The options that ask a pruning step for a share, such as 0.5, or a pattern, such as 2:4."""
    if ":" not in share:
        return {"sparsity": float(share)}
    kept, of = map(int, share.split(":"))
    return {"sparsity": 1 - kept / of, "pattern": share}


def criteria(shares: list[str]) -> list[Case]:
    """Every criterion with the same share in each layer."""
    return [Case(share, [{name: zeros(share)}]) for share in shares for name in ("magnitude", "wanda", "ria", "sparsegpt")]


def allocation(shares: list[str]) -> list[Case]:
    """SparseGPT with shares that differ from layer to layer."""
    rules: list[tuple[str, dict[str, Any]]] = [("erk", {"power": 1.0}), ("erk", {"power": 0.5})]
    rules += [(name, {}) for name in ("global_magnitude", "layer_norm_magnitude", "lamp")]
    found = []
    for share in shares:
        found.append(Case(share, [{"sparsegpt": zeros(share)}]))
        found += [Case(share, [{rule: {**options, **zeros(share)}}, {"sparsegpt": {"sparsity": None}}]) for rule, options in rules]
    return found


def reconstruction(shares: list[str]) -> list[Case]:
    """Two criteria, before and after the blocks are fitted to the original ones."""
    fitted = {"reconstruct": {"granularity": "block", "steps": 100, "batch": 4}}
    behind: list[Steps] = [[], [fitted]]
    return [Case(share, [{name: zeros(share)}, *more]) for share in shares for name in ("wanda", "sparsegpt") for more in behind]


def joint(shares: list[str]) -> list[Case]:
    """SparseGPT that rounds to 4 bits in its pass, in two ways, and GPTQ behind it."""
    found = []
    for share in shares:
        found.append(Case(share, [{"sparsegpt": zeros(share)}]))
        found.append(Case(share, [{"sparsegpt": {**zeros(share), "scheme": "W4A16_G64"}}]))
        found.append(Case(share, [{"sparsegpt": {**zeros(share), "scheme": "W4A16_G64", "act_order": "none"}}]))
        found.append(Case(share, [{"sparsegpt": zeros(share)}, {"gptq": {"scheme": "W4A16_G64"}}]))
    return found


TABLES: dict[str, tuple[str, list[str], Callable[[list[str]], list[Case]]]] = {
    "criteria": ("Which weights become zero, SmolLM2-135M-Instruct", ["0.3", "0.5", "0.6", "0.7", "2:4", "4:8"], criteria),
    "allocation": ("How zeros are shared out over layers (SparseGPT), SmolLM2-135M-Instruct", ["0.5", "0.7"], allocation),
    "reconstruction": ("What fitting the blocks brings back, SmolLM2-135M-Instruct", ["0.6"], reconstruction),
    "joint": ("Zeros and 4 bits, SmolLM2-135M-Instruct", ["0.5", "2:4"], joint),
}
"""By name: title, the shares that are asked for unless others are, and the rows."""


def measured(case: Case, seeds: list[int], samples: Samples, base: float) -> list[Any]:
    """Compress with each seed and measure on held-out text."""
    lost, shares, seconds = list[float](), list[float](), list[float]()
    recipe = {"name": "case", "steps": case.steps}
    for seed in seeds:
        network = aerogel.load(MODEL, lazy=False, dtype=torch.float32)
        start = time.perf_counter()
        result = aerogel.compress(network, recipe, samples=samples, measures=[], seed=seed)
        seconds.append(time.perf_counter() - start)
        lost.append(PERPLEXITY.measure(result.network)["nats_per_token"] - base)
        shares.append(overall(result.network))
    mean = statistics.mean(lost)
    each = ", ".join(f"{one:.4f}" for one in lost)
    perplexity = float(torch.tensor(base + mean).exp())
    return [case.share, case.name, round(statistics.mean(shares), 4), perplexity, mean, each, statistics.median(seconds)]


def overall(network: Any) -> float:
    """The share of zeros among the weights of all layers in blocks."""
    layers = (layer for block in network.blocks().values() for layer in block.modules() if getattr(layer, "in_features", 0))
    weights = [layer.weight for layer in layers]
    return sum(zero_share(weight) * weight.numel() for weight in weights) / sum(weight.numel() for weight in weights)


def is_there(table: str, case: Case, settings: dict[str, Any]) -> bool:
    """Return True for a row that was measured under the same settings."""
    path = FOLDER / f"sparsity_{table}.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return before.get("settings") == settings and [case.share, case.name] in [row[:2] for row in before["rows"]]


def keep(table: str, row: list[Any], settings: dict[str, Any]) -> None:
    """Write a row into its table, beside those measured under the same settings."""
    print(*row, flush=True)
    path = FOLDER / f"sparsity_{table}.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "settings": settings}
    rows = [old for old in before["rows"] if old[:2] != row[:2]] if before["settings"] == settings else []
    notes = [
        "Perplexity of held-out text with the mean loss of the seeds; nats lost against the original.",
        "Zeros: the share of all weights of linear layers in blocks. Embeddings and the tied head stay dense.",
    ]
    write(path.stem, TABLES[table][0], settings, COLUMNS, sorted([*rows, row], key=lambda one: one[0]), notes)


def main() -> None:
    """Run the cases of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", *sparsity_models.SUBJECTS], default="smollm2")
    parser.add_argument("--table", choices=TABLES, default="criteria", help="Of smollm2; other models have one table.")
    parser.add_argument("--shares", nargs="+", help="Shares of zeros or patterns, such as 0.5 2:4.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--full", action="store_true", help="Of other models: every criterion with every allocation and adjustment.")
    parser.add_argument("--minutes", type=float, default=15.0, help="Of other models: stop after so long.")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.model != "smollm2":
        budgets = given.shares or sparsity_models.BUDGETS
        print(sparsity_models.run(given.model, budgets, given.full, given.minutes, given.threads))
        return
    samples = Samples("sotu", given.samples, 512)
    original = PERPLEXITY.measure(aerogel.load(MODEL, lazy=False, dtype=torch.float32))
    settings = {
        "original perplexity": round(original["perplexity"], 2),
        "calibration": f"State of the Union 1950-1999, {given.samples} x 512 tokens",
        "held out": original["source"],
        "scored tokens": original["tokens"],
        "seeds": ", ".join(map(str, given.seeds)),
        "dtype": "float32",
        "threads": given.threads,
    }
    _, shares, cases = TABLES[given.table]
    for case in cases(given.shares or shares):
        if not is_there(given.table, case, settings):
            keep(given.table, measured(case, given.seeds, samples, original["nats_per_token"]), settings)


if __name__ == "__main__":
    main()
