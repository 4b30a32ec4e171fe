"""Long prompts of SmolLM2-135M under policies that drop tokens: time to the first token, and numbers found again in book text.

    python benchmarks/long_prompts.py                   # over an hour on two cores -> results/long_prompts.json
    python benchmarks/long_prompts.py --lengths 8000    # prompts of this length alone; rows of others stay in the file
    python benchmarks/long_prompts.py --quick           # prompts of 1,024 tokens, one round; nothing is written

The prompts that are judged are drawn by a seed that no setting was chosen with.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from results import FOLDER, write

from aerogel.data import text
from aerogel.engine.opening import open_model
from aerogel.evaluate.measure import tokenizer_of
from aerogel.evaluate.needle_recall import NeedleRecall
from aerogel.inference.generate import Generator
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.prompt_tokens.fastkv import Fastkv
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.methods.prompt_tokens.random_blocks import RandomBlocks
from aerogel.methods.prompt_tokens.recent_blocks import RecentBlocks
from aerogel.methods.tokens.policy import TokenState
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.stage import Selection, Stage

MODEL, ROUNDS, NEW_TOKENS, THREADS = "smollm2-135m", 3, 2, 2
PROMPTS = {4096: 2, 8000: 1}
"""Prompts at each depth that are judged, by their length; the model has 8,192 positions, for the answer too."""
KEYS = (1, 4)
"""Numbers that are hidden in a prompt, one of which is asked for. Prompts with several are not timed: they are read as those with one."""
LEAST, SEED = 1024, 1
NAME = "long_prompts"
COLUMNS = ["prompt", "numbers hidden", "policy", "first token, seconds", "times faster", "times fewer operations", "numbers found"]


@dataclass(frozen=True)
class Truncated(RecentBlocks):
    """Cuts the middle out of a prompt before it is read; what is left is a prompt of its own."""

    def choose(self, budget: float, stage: Stage) -> Selection | None:
        """Keep the first and the latest tokens, and renumber them."""
        selection = super().choose(budget, stage)
        return None if selection is None else selection._replace(renumber=True)


def policies(network: Network, length: int) -> dict[str, RuntimePolicy[Any] | None]:
    """Return what is compared at one length; all but the last two go by the stages of prompt_pruning."""
    pruning = PromptPruning(min_length=LEAST)
    short = truncated_length(network, pruning, length)
    found: dict[str, RuntimePolicy[Any] | None] = {
        "all tokens": None,
        "prompt_pruning": pruning,
        "random_blocks": RandomBlocks(min_length=LEAST),
        "recent_blocks": RecentBlocks(min_length=LEAST),
        f"truncated to {short:,} tokens": Truncated(min_length=LEAST, layers=(0,), keep=(short,), sink=64, block=16),
    }
    if length <= min(PROMPTS):
        found["prompt_pruning, attention: mean"] = PromptPruning(min_length=LEAST, attention="mean")
        found["fastkv, whole cache"] = Fastkv(cache=1.0, min_length=LEAST)
    return found


def truncated_length(network: Network, pruning: PromptPruning, length: int) -> int:
    """Return the length of prompts that cost as many operations as pruned ones."""
    pruned = operations(network, lengths(network, pruning, length))
    depth = decoder_of(network).depth
    return max(short for short in range(64, length, 16) if operations(network, [short] * depth) <= pruned)


def lengths(network: Network, pruning: PromptPruning, length: int) -> list[int]:
    """Return the positions that each block computes, by the budgets."""
    depth, left, found = decoder_of(network).depth, length, []
    budgets = dict(zip(sorted(pruning.rules(depth)), pruning.keep, strict=True))
    for block in range(depth):
        left = round(budgets[block] * length) if block in budgets else left
        found.append(left)
    return found


def operations(network: Network, computed: list[int]) -> float:
    """Multiplications of the blocks for so many positions in each of them."""
    config = network.config
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    linear = 2 * width * width + 2 * width * (width // heads * config.num_key_value_heads) + 3 * width * inner
    return float(sum(linear * length + width * length**2 for length in computed))


@contextmanager
def put_on(network: Network, policy: RuntimePolicy[Any] | None) -> Iterator[None]:
    """Put a policy on for a while; these need no calibration."""
    with ExitStack() as stack:
        if policy is not None:
            stack.enter_context(policy.on(network, TokenState(blocks=decoder_of(network).depth)))
        yield


def first_token(network: Network, prompt_1T: torch.Tensor) -> float:
    """Seconds until the first token of a prompt is there."""
    return Generator(network, 1, prompt_1T.shape[1] + NEW_TOKENS).generate(prompt_1T, NEW_TOKENS).first_token_seconds


def timed(network: Network, compared: dict[str, RuntimePolicy[Any] | None], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds until the first token, round by round."""
    prompt_1T = text.samples(tokenizer_of(network), "moby-dick", 1, length, seed=2)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(rounds + 1):
        for name, policy in compared.items():
            with put_on(network, policy):
                taken = first_token(network, prompt_1T)
            if turn:  # in the first one kernels are chosen and memory grows
                seconds[name].append(taken)
    return seconds


def compare(network: Network, length: int, count: int, rounds: int) -> list[list[Any]]:
    """Rows of the table for one length."""
    compared = policies(network, length)
    seconds = timed(network, compared, length, rounds)
    whole, rows = seconds["all tokens"], []
    predicted = operations(network, [length] * decoder_of(network).depth)
    for keys in KEYS:
        needles = NeedleRecall(length=length, count=count, keys=keys, seed=SEED)
        for name, policy in compared.items():
            with put_on(network, policy):
                found = needles.measure(network)
            faster = statistics.median(one / other for one, other in zip(whole, seconds[name], strict=True))
            is_staged = isinstance(policy, PromptPruning | RandomBlocks | RecentBlocks)
            fewer = predicted / operations(network, lengths(network, PromptPruning(), length)) if is_staged else None
            speed = [round(statistics.median(seconds[name]), 2), round(faster, 2), fewer] if keys == KEYS[0] else [None] * 3
            rows.append([length, keys, name, *speed, f"{round(found['recall'] * found['count'])} of {found['count']}"])
            print(*rows[-1], flush=True)
    return rows


def written(but: Sequence[int]) -> list[list[Any]]:
    """Rows that are in the file already, except those of these lengths; older ones are of prompts with a single number."""
    path = FOLDER / f"{NAME}.json"
    document = json.loads(path.read_text()) if path.exists() else {"columns": COLUMNS, "rows": []}
    rows = [{COLUMNS[1]: KEYS[0]} | dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]
    return [[row.get(column) for column in COLUMNS] for row in rows if row["prompt"] not in but]


def main() -> None:
    """Measure and write."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--lengths", type=int, nargs="+", choices=sorted(PROMPTS), default=sorted(PROMPTS), help="tokens of prompts [all]")
    asked.add_argument("--quick", action="store_true", help=f"prompts of {LEAST:,} tokens, one round; nothing is written")
    options = asked.parse_args()
    torch.set_num_threads(THREADS)
    network = open_model(MODEL, dtype=torch.float32)
    if options.quick:
        compare(network, LEAST, 1, 1)
        return
    for length in options.lengths:
        rows = compare(network, length, PROMPTS[length], ROUNDS)
        save(sorted(written(but=[length]) + rows, key=lambda row: row[:2]))


def save(rows: list[list[Any]]) -> None:
    """Write what there is so far."""
    settings = {
        "model": MODEL, "dtype": "float32", "rounds": ROUNDS, "threads": THREADS,
        "stages": "tokens left 1/2, 1/4, 1/8 from depths 1/3, 1/2, 2/3 on",
        "needles": f"depths 0 to 1 in quarters, {' and '.join(map(str, PROMPTS.values()))} prompts each, seed {SEED}",
    }  # fmt: skip
    notes = [
        "Settings take turns round after round; seconds are medians, and times faster are medians of the ratios within a round.",
        "Truncated prompts have the first 64 tokens and the last ones, as many as cost the operations of a pruned prompt.",
        "Of several hidden numbers one is asked for. Such prompts are read as those with one, and are not timed again.",
        "With so few prompts, differences of two numbers mean little.",
    ]
    write(NAME, "Long prompts with fewer tokens", settings, COLUMNS, rows, notes)


if __name__ == "__main__":
    main()
