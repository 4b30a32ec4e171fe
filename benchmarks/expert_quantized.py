"""4-bit experts and skipped experts together at the layer shape of Qwen3-30B-A3B; writes benchmarks/results/expert_quantized.json.

python benchmarks/expert_quantized.py                # CPU, 2 layers: 4 GB
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from expert_speed import EXPERTS, HIDDEN, PROMPT, TOP, Decode, Prefill, build, realised, state, timed
from results import write
from torch import nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.methods.experts.modes import Modes
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping import backend

COLUMNS = [
    "phase",
    "variant",
    "MB of weights",
    "assignments skipped",
    "milliseconds",
    "speed-up over float",
    "relative to the product of both",
]
NOTES = [
    "One process, variants alternate, medians; prefill of 512 tokens, then decoding of one token, batch 1; weights as in expert_speed.",
    "Float experts are fused and use our implementation. 4-bit experts (W4A16, groups of 64) run one by one, with 4-bit attention layers.",
    (
        "Skipping: MoDES with importance that decreases by a third from layer to layer. Thresholds meet the ratio on "
        "this prompt, for each model."
    ),
]  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Build, quantize, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.88)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain = open_model(build(given.layers, getattr(torch, given.dtype), "cpu"), unfuse_experts=False)
    coded = aerogel.compress(
        build(given.layers, getattr(torch, given.dtype), "cpu"), {"steps": [{"rtn": {"scheme": "W4A16_G64"}}]}, measures=()
    ).network
    ids = torch.randint(0, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    rows = []
    for phase, cls in (("prefill", Prefill), ("decode", Decode)):
        running = {name: cls(network, ids) for name, network in (("float", plain), ("W4A16", coded))}
        call = Prefill(plain, ids).call
        ons: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {}
        for name, network in (("float", plain), ("W4A16", coded)):
            ons[name] = (name, nullcontext)
            policy = state(network, given.ratio, True, call, given.layers)
            ons[f"{name}, {given.ratio:.0%} skipped"] = (name, partial(Modes().on, network, policy))
        taken = timed({label: partial(running[name].turn, on, backend.NAME) for label, (name, on) in ons.items()}, given.rounds, "cpu")
        times = {label: statistics.median(a / b for a, b in zip(taken["float"], seconds, strict=True)) for label, seconds in taken.items()}
        _, only_skipped, only_coded, both = times
        for label, (name, on) in ons.items():
            skipped = realised(running[name].network, running[name], on, backend.NAME)
            product = times[both] / (times[only_skipped] * times[only_coded]) if label == both else None
            milliseconds = 1000 * statistics.median(taken[label]) / running[name].forwards
            rows.append([phase, label, megabytes(running[name].network), skipped, milliseconds, times[label], product])
            print(rows[-1], flush=True)
    settings = {
        "layers": given.layers, "shape": f"{EXPERTS} experts, {TOP} a token, hidden {HIDDEN}, expert 768", "dtype": given.dtype,
        "threads": given.threads, "rounds": given.rounds, "seed": 0,
    }  # fmt: skip
    write("expert_quantized", "4-bit experts with expert skipping", settings, COLUMNS, rows, NOTES)


def megabytes(network: Network) -> float:
    """What the blocks take."""
    tensors = [tensor for block in network.blocks().values() for tensor in nn.Module.state_dict(block).values()]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


if __name__ == "__main__":
    main()
