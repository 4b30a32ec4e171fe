"""Long prompts of SmolLM2-135M under policies that drop or evict tokens: time to the first token, and numbers found again in book text.

    python benchmarks/long_prompts.py                # about a quarter of an hour on two cores -> results/long_prompts.json

The prompts that are judged are drawn by a seed that no setting was chosen with.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from results import write

from aerogel.data import text
from aerogel.engine.opening import open_model
from aerogel.evaluate.measure import tokenizer_of
from aerogel.evaluate.needle_recall import NeedleRecall
from aerogel.inference.generate import Generator
from aerogel.methods.base import RuntimePolicy
from aerogel.methods.kv_eviction.snapkv import Snapkv
from aerogel.methods.prompt_tokens.fastkv import Fastkv
from aerogel.methods.prompt_tokens.prompt_pruning import PromptPruning
from aerogel.methods.prompt_tokens.uniprefill import Uniprefill
from aerogel.model.network import Network

MODEL, LENGTH, LEAST, ROUNDS, NEW_TOKENS, THREADS = "smollm2-135m", 2048, 1024, 3, 2, 2
NEEDLES = NeedleRecall(length=LENGTH, count=2, seed=1)
POLICIES: dict[str, RuntimePolicy[Any] | None] = {
    "all tokens": None,
    "prompt_pruning": PromptPruning(min_length=LEAST),
    "prompt_pruning, 1/2 and 1/4 at depths 0.67 and 0.83": PromptPruning(keep=(0.5, 0.25), at=(0.67, 0.83), min_length=LEAST),
    "prompt_pruning, blocks of 16": PromptPruning(block=16, sub_block=16, min_length=LEAST),
    "fastkv, whole cache": Fastkv(cache=1.0, min_length=LEAST),
    "uniprefill": Uniprefill(min_length=LEAST),
    "snapkv, 512 tokens, kernel 15": Snapkv(keep=512, kernel=15),
}


@contextmanager
def put_on(network: Network, policy: RuntimePolicy[Any] | None, states: dict[str, Any], name: str) -> Iterator[None]:
    """Put a policy on with a state that is calibrated once."""
    with ExitStack() as stack:
        if policy is not None:
            if name not in states:
                calls = text.calls(text.samples(tokenizer_of(network), "sotu", 1, LENGTH, seed=0), batch=1)
                states[name] = policy.calibrate(network, calls)
            stack.enter_context(policy.on(network, states[name]))
        yield


def first_token(network: Network, prompt_1T: torch.Tensor) -> float:
    """Seconds until the first token of a prompt is there."""
    return Generator(network, 1, LENGTH + NEW_TOKENS).generate(prompt_1T, NEW_TOKENS).first_token_seconds


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(THREADS)
    network, states = open_model(MODEL, dtype=torch.float32), dict[str, Any]()
    prompt_1T = text.samples(tokenizer_of(network), "moby-dick", 1, LENGTH, seed=2)
    seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
    for turn in range(ROUNDS + 1):
        for name, policy in POLICIES.items():
            with put_on(network, policy, states, name):
                taken = first_token(network, prompt_1T)
            if turn:  # in the first one kernels are chosen and memory grows
                seconds[name].append(taken)
    whole, rows = seconds["all tokens"], []
    for name, policy in POLICIES.items():
        with put_on(network, policy, states, name):
            found = NEEDLES.measure(network)
        faster = statistics.median(one / other for one, other in zip(whole, seconds[name], strict=True))
        right = round(found["recall"] * found["count"])
        rows.append([name, round(statistics.median(seconds[name]), 2), round(faster, 2), f"{right} of {found['count']}"])
        print(*rows[-1], flush=True)
    settings = {
        "model": MODEL, "dtype": "float32", "prompt": LENGTH, "min_length": LEAST, "rounds": ROUNDS, "threads": THREADS,
        "needles": f"one key, {len(NEEDLES.depths)} depths, {NEEDLES.count} prompts each, seed {NEEDLES.seed}",
    }  # fmt: skip
    columns = ["policy", "first token, seconds", "times faster", "numbers found"]
    notes = [
        "Settings take turns round after round; seconds are medians, and times faster are medians of the ratios within a round.",
        "With so few prompts, differences of two numbers mean little.",
    ]
    write("long_prompts", f"Prompts of {LENGTH:,} tokens with fewer tokens", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
