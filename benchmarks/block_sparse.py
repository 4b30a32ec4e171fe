"""What zeros in blocks of 32 x 32 save of wall-clock, layer by layer and in SmolLM2-135M; writes benchmarks/results/block_sparse*.json.

python benchmarks/block_sparse.py layers
python benchmarks/block_sparse.py decode
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from results import write
from torch import Tensor
from torch.nn.functional import linear

import aerogel
from aerogel.evaluate.perplexity import Perplexity
from aerogel.evaluate.speed import Speed
from aerogel.kernels.sparse_linear import Blocks

MODEL = "smollm2-135m"
SIDE = 32
SHAPES = ((2048, 2048), (1536, 576))
"""Outputs and inputs: a common layer, and one of the MLP of SmolLM2-135M."""
ZEROS = (0.5, 0.75, 0.9)
ROWS = (1, 16)
ROUNDS = {"layers": 200, "decode": 15}
WAYS = ("dense float32", "blocks float32", "torch BSR float32", "dense bfloat16", "blocks bfloat16")
PERPLEXITY = Perplexity(tokens=2048, stride=511, length=512)


def weight(outputs: int, inputs: int, share: float) -> Tensor:
    """Random numbers in which each row of blocks has lost the same share, as Wanda prunes them."""
    generator = torch.Generator().manual_seed(0)
    score_RC = torch.rand(outputs // SIDE, inputs // SIDE, generator=generator)
    kept_RC = score_RC.argsort(1).argsort(1) >= round(share * score_RC.shape[1])
    kept_OI = kept_RC.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
    return torch.randn(outputs, inputs, generator=generator) * kept_OI


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, in turns (A B C A B C)."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if number > 1:  # two rounds warm up
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: median(one) for name, one in taken.items()}


def layers(rounds: int) -> None:
    """One linear layer at a time."""
    rows_of_table: list[list[Any]] = []
    for outputs, inputs in SHAPES:
        for share in ZEROS:
            weight_OI = weight(outputs, inputs, share)
            blocks, bsr, half = Blocks(weight_OI, None, torch.float32), weight_OI.to_sparse_bsr((SIDE, SIDE)), weight_OI.bfloat16()
            for rows in ROWS:
                x = torch.randn(rows, inputs)
                torch.testing.assert_close(blocks(x), linear(x, weight_OI), rtol=1e-3, atol=1e-3)
                # Between two products with the same weight lie others, which push it out of the cache.
                ways: dict[str, Callable[[], object]] = {
                    "dense float32": partial(linear, x, weight_OI),
                    "blocks float32": partial(blocks, x),
                }
                if rows == 1:
                    ways["torch BSR float32"] = partial(_transposed, bsr, x)
                    ways["dense bfloat16"] = partial(linear, x.bfloat16(), half)
                    ways["blocks bfloat16"] = partial(blocks, x.bfloat16())
                took = interleaved(ways, rounds)
                over = [took[f"dense {name}"] / took[f"blocks {name}"] for name in ("float32", "bfloat16") if f"dense {name}" in took]
                figures = [took.get(name) for name in WAYS]
                rows_of_table.append([f"{outputs} x {inputs}", f"{share:.0%}", rows, *figures, *over, *[None] * (2 - len(over))])
                print(*rows_of_table[-1], flush=True)
    columns = ["layer", "zero blocks", "rows", *(f"{name}, ms" for name in WAYS), "speed-up in float32", "speed-up in bfloat16"]
    notes = [
        "Each the median of calls that take turns in one process. Speed-up: dense over blocks, both with inputs of that dtype.",
        "blocks: the kernel of this package, which multiplies float32 for either dtype. torch BSR: torch's block-sparse tensor (MKL).",
        "Zeros of this share in each row of blocks. At run time the faster of blocks and dense is used, for each shape and number of rows.",
    ]
    settings = {"block": f"{SIDE} x {SIDE}", "rounds": rounds, "threads": torch.get_num_threads()}
    write("block_sparse", "Linear layers with zero blocks", settings, columns, rows_of_table, notes)


def _transposed(bsr: Tensor, x: Tensor) -> Tensor:
    """The faster order of torch's product: in the other, sums of a row of inputs take up to four times as long."""
    found: Tensor = (bsr @ x.T).T
    return found


def decode(rounds: int, dtypes: list[str]) -> None:
    """The whole model through the generation of this package, each pruned model against the original in the same dtype."""
    rows: list[list[Any]] = []
    for dtype in (getattr(torch, name) for name in dtypes):
        networks = {"original": aerogel.load(MODEL, lazy=False, dtype=dtype)}
        for share in ZEROS[1:]:
            network = aerogel.load(MODEL, lazy=False, dtype=dtype)
            steps = [{"magnitude": {"sparsity": share, "pattern": f"{SIDE}x{SIDE}", "compared": "row"}}]
            networks[f"magnitude, {share:.0%} in blocks"] = aerogel.compress(network, {"steps": steps}, measures=[]).network
        took = Speed(batch=1, prompt=128, new_tokens=24, rounds=rounds, threads=torch.get_num_threads()).compare(networks)
        for name, network in networks.items():
            facts = took[name]
            perplexity = PERPLEXITY.measure(network)["perplexity"] if dtype == torch.float32 else None
            speeds = ("prefill_tokens_per_second", "decode_tokens_per_second", "prefill_speedup", "decode_speedup")
            figures = [facts[speed] for speed in speeds]
            rows.append([str(dtype).removeprefix("torch."), name, *figures, perplexity])
            print(*rows[-1], flush=True)
    columns = ["dtype", "model", "prefill tok/s", "decode tok/s", "prefill speed-up", "decode speed-up", "perplexity"]
    notes = [
        "Models take turns in one process, through the same generation code. Speed-ups are medians of the ratios within a round.",
        "576 inputs are 18 blocks: the share is rounded down to whole blocks of a row.",
        "Nothing is fitted afterwards: the perplexity is what such zeros cost without that.",
    ]
    settings = {"batch": 1, "prompt": 128, "new tokens": 24, "rounds": rounds, "threads": torch.get_num_threads()}
    write("block_sparse_decode", "SmolLM2-135M with zero blocks of 32 x 32", settings, columns, rows, notes)


def main() -> None:
    """Run one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tuple(ROUNDS))
    parser.add_argument("--rounds", type=int, help="Turns that are measured [200 of layers, 15 of decode].")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", UserWarning)  # that BSR tensors are in beta
    rounds = given.rounds or ROUNDS[given.table]
    {"layers": layers, "decode": partial(decode, dtypes=given.dtypes)}[given.table](rounds)


if __name__ == "__main__":
    main()
