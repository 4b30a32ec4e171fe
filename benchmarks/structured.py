"""What fewer FFN channels, heads and layers cost SmolLM2-135M, and the wall-clock that they save; writes results/structured_pruning.json.

python benchmarks/structured.py [--samples 8] [--threads 1] [--rounds 3] [--only "FFN 25 %"]

Each row compresses the model anew, measures it on held-out text, and times it in turns with the original. Rows stand beside those that
are there already under the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from results import FOLDER, write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import aerogel
from aerogel.engine.calibration import Samples
from aerogel.evaluate.perplexity import Perplexity
from aerogel.model.network import Network

MODEL, NAME = "smollm2-135m", "structured_pruning"
PERPLEXITY = Perplexity(tokens=4096, stride=511, length=512)
PROMPT, NEW = 512, 16
"""Tokens of the prompt, and those decoded behind it."""
LARGER, LAYERS = "FFN 25 %, layers of Llama 3.2 1B", 4
COLUMNS = [
    "removed", "steps", "weights left", "perplexity", "nats lost", "prefill ms", "prefill speed-up", "of the layers expected",
    "decode ms", "decode speed-up", "seconds to compress",
]  # fmt: skip
NOTES = [
    "Perplexity of held-out text; nats lost against the original. Weights: of the whole model, embeddings included.",
    (
        f"Prefill of {PROMPT} tokens with the logits of the last one, and {NEW} tokens decoded one by one behind them, batch 1: median of "
        "the ratios of neighbouring turns. One process, original and pruned model in turns."
    ),
    "Expected of layers: L / (L - n), by which the time of all but embedding and head falls.",
    f"The last row has random weights in {LAYERS} layers of the shape of Llama 3.2 1B: it is timed only.",
    "Target: 1.2 times in prefill with 25 % of the FFN channels removed.",
]


@dataclass(frozen=True)
class Case:
    """A row: what is removed, and by which steps."""

    removed: str
    steps: list[dict[str, Any]]
    expected: float | None = None
    """The speed-up that the number of layers makes one expect."""

    @property
    def name(self) -> str:
        """The steps with their options."""
        return ", then ".join(f"{name} ({_options(values)})" for step in self.steps for name, values in step.items())


def _options(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items())


def cases(layers: int) -> list[Case]:
    """FFN channels by every criterion, heads, both, and whole layers."""
    found = [
        Case("FFN 25 %", [{"prune_ffn_channels": {"share": 0.25, "criterion": criterion, "repair": repair}}])
        for criterion in ("obs", "wanda", "magnitude")
        for repair in (True, False)
    ]
    found += [
        Case("heads 1/3", [{"prune_attention_heads": {"share": 0.33, "criterion": "obs", "repair": repair}}]) for repair in (True, False)
    ]
    both = [{"prune_attention_heads": {"share": 0.33}}, {"prune_ffn_channels": {"share": 0.25}}]
    found.append(Case("heads 1/3, FFN 25 %", both))
    found += [Case(f"{count} of {layers} layers", [{"shortgpt": {"count": count}}], layers / (layers - count)) for count in (1, 3, 6, 9)]
    return found


def weights(network: Network) -> int:
    """The number of weights, shared ones once."""
    return sum(parameter.numel() for parameter in network.module.parameters())


class Timed:
    """One model with a prompt."""

    def __init__(self, network: Network) -> None:
        self.module: Any = network.module
        self.ids = torch.randint(0, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def prefill(self) -> None:
        """The whole prompt at once, into a cache."""
        self.module(self.ids, past_key_values=DynamicCache(config=self.module.config), use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        """Some tokens behind the prompt, one by one."""
        for token in self.ids[:, :NEW].split(1, dim=1):
            self.module(token, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-NEW)

    def fill(self) -> None:
        """Put the prompt into the cache that is decoded with."""
        self.cache = DynamicCache(config=self.module.config)
        self.module(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


def in_turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Return the median seconds of the second, and the median of how often it fits into the first, turn by turn after one for nothing."""
    first, second = list[float](), list[float]()
    for _ in range(rounds + 1):
        for run, taken in ((one, first), (other, second)):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(second[1:]), statistics.median(a / b for a, b in zip(first[1:], second[1:], strict=True))


def measured(case: Case, dense: Network, base: float, samples: Samples, rounds: int) -> list[Any]:
    """Compress, measure on held-out text, and time beside the original."""
    network = aerogel.load(MODEL, lazy=False, dtype=torch.float32)
    start = time.perf_counter()
    network = aerogel.compress(network, {"name": "case", "steps": case.steps}, samples=samples, measures=[]).network
    seconds = time.perf_counter() - start
    nats = PERPLEXITY.measure(network)["nats_per_token"]
    left, prefill, decode = timed(dense, network, rounds)
    perplexity = float(torch.tensor(nats).exp())
    return [case.removed, case.name, left, perplexity, nats - base, *prefill, case.expected, *decode, seconds]


@torch.no_grad()
def timed(dense: Network, network: Network, rounds: int) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Return the share of the weights that is left, and milliseconds with the speed-up, of a prefill and of a decoded token."""
    one, other = Timed(dense), Timed(network)
    prefill = in_turns(one.prefill, other.prefill, rounds)
    for each in (one, other):
        each.fill()
    decode = in_turns(one.decode, other.decode, rounds)
    return round(weights(network) / weights(dense), 3), (1000 * prefill[0], prefill[1]), (1000 * decode[0] / NEW, decode[1])


def larger(rounds: int) -> list[Any]:
    """Time the layers of a larger model, without embeddings of its size: its FFN is a larger part of it."""
    shape = {
        "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    dense, network = (aerogel.load(LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)) for _ in range(2))
    options = {"share": 0.25, "criterion": "magnitude", "repair": False}
    aerogel.compress(network, {"name": "case", "steps": [{"prune_ffn_channels": options}]}, measures=[])
    left, prefill, decode = timed(dense, network, rounds)
    return [LARGER, f"prune_ffn_channels ({_options(options)})", left, None, None, *prefill, None, *decode, None]


def keep(row: list[Any], order: list[list[str]], settings: dict[str, Any]) -> None:
    """Write a row beside those measured under the same settings."""
    print(*row, flush=True)
    path = FOLDER / f"{NAME}.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "settings": settings}
    rows = [old for old in before["rows"] if old[:2] != row[:2]] if before["settings"] == settings else []
    place = partial(_place, order)
    write(NAME, "Fewer channels, heads and layers, SmolLM2-135M-Instruct", settings, COLUMNS, sorted([*rows, row], key=place), NOTES)


def _place(order: list[list[str]], row: list[Any]) -> int:
    return order.index(row[:2]) if row[:2] in order else len(order)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="Measure only rows with one of these texts in them, in this order.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dense = aerogel.load(MODEL, lazy=False, dtype=torch.float32)
    original = PERPLEXITY.measure(dense)
    settings = {
        "original perplexity": round(original["perplexity"], 2),
        "calibration": f"State of the Union 1950-1999, {given.samples} x 512 tokens",
        "held out": original["source"],
        "scored tokens": original["tokens"],
        "dtype": "float32",
        "threads": given.threads,
        "rounds": given.rounds,
    }
    every = cases(dense.config.num_hidden_layers)
    order = [[one.removed, one.name] for one in every]
    for only in given.only or [""]:
        for case in every:
            if only in f"{case.removed}: {case.name}":
                row = measured(case, dense, original["nats_per_token"], Samples("sotu", given.samples, 512), given.rounds)
                keep(row, order, settings)
        if only in LARGER:
            keep(larger(given.rounds), order, settings)


if __name__ == "__main__":
    main()
