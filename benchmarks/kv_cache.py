"""Quantized key-value caches of SmolLM2-135M: perplexity by decoding, bytes, and decode speed at a context of 4,096 tokens.

python benchmarks/kv_cache.py quality   # about half an hour on two cores -> results/kv_cache.json
python benchmarks/kv_cache.py speed     # about ten minutes -> results/kv_cache_speed.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from results import write

from aerogel.data import text
from aerogel.engine.opening import open_model
from aerogel.evaluate.decode_perplexity import DecodePerplexity
from aerogel.evaluate.measure import tokenizer_of
from aerogel.inference.generate import Generation, Generator
from aerogel.methods.kv_cache.kivi import Kivi
from aerogel.methods.kv_cache.kv_cache_fp8 import KVCacheFP8
from aerogel.methods.kv_cache.kv_cache_int import KVCacheInt
from aerogel.methods.kv_cache.policy import KVCachePolicy
from aerogel.model.network import Network

MODEL, CONTEXT, NEW_TOKENS, ROUNDS, THREADS = "smollm2-135m", 4096, 16, 3, 2
MEASURE = DecodePerplexity(tokens=2048, length=512, stride=256, batch=8)
POLICIES: dict[str, KVCachePolicy | None] = {
    "16 bits (float32 here)": None,
    "kv_cache_fp8, per tensor": KVCacheFP8(),
    "kv_cache_fp8, per head": KVCacheFP8(granularity="attn_head"),
    "kv_cache_int, 8 bits": KVCacheInt(bits=8),
    "kv_cache_int, 4 bits": KVCacheInt(bits=4),
    "kv_cache_int, 4 bits, 8 of 30 layers kept": KVCacheInt(bits=4, keep=8),
    "kivi, 4 bits": Kivi(bits=4),
    "kivi, 2 bits": Kivi(bits=2),
}
TIMED = [name for name in POLICIES if "head" not in name and "kept" not in name]


def calibration(network: Network) -> list[Any]:
    """16 sequences of 512 tokens of the shipped calibration text."""
    return text.calls(text.samples(tokenizer_of(network), "sotu", 16, 512, seed=0), batch=8)


@contextmanager
def put_on(network: Network, policy: KVCachePolicy | None, states: dict[KVCachePolicy, Any]) -> Iterator[None]:
    """Put a policy on with a state that is calibrated once."""
    with ExitStack() as stack:
        if policy is not None:
            states.setdefault(policy, None)
            states[policy] = states[policy] or policy.calibrate(network, calibration(network))
            stack.enter_context(policy.on(network, states[policy]))
        yield


def decoded(network: Network, prompt_1T: torch.Tensor) -> Generation:
    """Write some tokens behind a long prompt with the fast decoder."""
    return Generator(network, 1, CONTEXT + NEW_TOKENS).generate(prompt_1T, NEW_TOKENS)


def quality(network: Network) -> None:
    """Perplexity by decoding and bytes."""
    states: dict[KVCachePolicy, Any] = {}
    figures = {}
    for name, policy in POLICIES.items():
        with put_on(network, policy, states):
            figures[name] = MEASURE.measure(network)
            print(name, figures[name]["perplexity"], figures[name]["cache_bytes_per_token"], flush=True)
    plain, rows = figures[next(iter(POLICIES))], []
    for name, found in figures.items():
        size = found["cache_bytes_per_token"]
        lost = found["nats_per_token"] - plain["nats_per_token"]
        smaller = plain["cache_bytes_per_token"] / 2 / size  # bfloat16 takes half of float32
        rows.append([name, round(found["perplexity"], 3), round(lost, 5), size, round(smaller, 2)])
    settings = {
        "text": f"{MEASURE.source}, {MEASURE.tokens} tokens, windows of {MEASURE.length} that move by {MEASURE.stride}",
        "calibration": "sotu, 16 x 512 tokens, seed 0",
        "weights": "float32",
        "threads": THREADS,
    }
    columns = ["cache", "perplexity by decoding", "nats lost", "bytes per token", "smaller than bfloat16"]
    notes = [
        "The cache of this run is float32, as the weights are.",
        "Bytes are those stored, of windows of 512 tokens; of KIVI 128 of these are not quantized.",
    ]
    write("kv_cache", "Quantized key-value cache, SmolLM2-135M-Instruct: quality and size", settings, columns, rows, notes)


def speed(network: Network) -> None:
    """Decode speed behind a long prompt, in turns, so that other load on the machine meets all of them."""
    prompt_1T = text.tokens(tokenizer_of(network), "sotu", CONTEXT)[None]
    states: dict[KVCachePolicy, Any] = {}
    steps, paths = {name: list[float]() for name in TIMED}, {}
    for number in range(ROUNDS):
        for name in TIMED:
            with put_on(network, POLICIES[name], states):
                made = decoded(network, prompt_1T)
            paths[name] = made.path
            steps[name].append(statistics.median(made.step_seconds))
            print(number, name, steps[name][-1], flush=True)
    plain, rows = next(iter(TIMED)), []
    for name in TIMED:
        ratio = statistics.median(own / other for own, other in zip(steps[plain], steps[name], strict=True))
        rows.append([name, round(1 / statistics.median(steps[name]), 2), round(ratio, 3), paths[name]])
    settings = {"weights": "float32", "context": CONTEXT, "new tokens": NEW_TOKENS, "rounds": ROUNDS, "batch": 1, "threads": THREADS}
    columns = ["cache", "decode tok/s", "over unquantized", "path"]
    notes = ["Median step of each round; the ratio is the median over rounds that alternate."]
    write("kv_cache_speed", "Quantized key-value cache, SmolLM2-135M-Instruct: decoding", settings, columns, rows, notes)


def main() -> None:
    torch.set_num_threads(THREADS)
    network = open_model(MODEL, lazy=False, dtype=torch.float32)
    {"quality": quality, "speed": speed}[sys.argv[1]](network)


if __name__ == "__main__":
    main()
