"""Thresholds found before or behind quantization, on the zoo's mixture; writes benchmarks/results/expert_recalibrated.json.

python benchmarks/expert_recalibrated.py             # ten minutes on one thread
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from expert_skipping import HELD, UNSEEN, ZOO, collages
from results import write

import aerogel
from aerogel.data import chats
from aerogel.engine import policies
from aerogel.engine.policies import CalibratedPolicy
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.layers.linear import cache_dequantized
from aerogel.methods.experts.modes import Modes
from aerogel.model.network import Network
from aerogel.recipe import Recipe

COLUMNS = [
    "weights",
    "ratio",
    "thresholds",
    "skipped in prompts",
    "in answers",
    "KL to float, nats",
    "seeds: min to max",
    "exact match",
]
NOTES = [
    "KL divergence between the quantized model with expert skipping and the float model without, over answer tokens; means over seeds.",
    "MoDES with power 0.25 and 24 thresholds per modality, calibrated on 64 chats with the float or the quantized model.",
]


def main() -> None:
    """Quantize, calibrate, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["W4A16_G32", "W2A16_G32"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.67, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain, rows = aerogel.load(ZOO / "fashion-vlm", lazy=False), []
    with tempfile.TemporaryDirectory() as folder:
        unseen = collages.write(collages.draw(collages.Items.held_out(1), HELD, UNSEEN), Path(folder) / "held")
        judge, shown = ExactMatch(source=str(unseen), count=HELD), []
        for seed in given.seeds:
            source = collages.write(collages.draw(collages.Items.held_out(0), 64, seed), Path(folder) / str(seed))
            shown.append(chats.calls(chats.read(source), plain.processor, 16))
        for scheme in given.schemes:
            coded = aerogel.compress(ZOO / "fashion-vlm", {"steps": [{"rtn": {"scheme": scheme, "observer": "mse"}}]}, measures=()).network
            with cache_dequantized(coded.module):
                alone = judge.measure(coded, plain)
                rows.append([scheme, 0.0, "none", 0.0, 0.0, alone["kl"], "1", alone["right"]])
                print(rows[-1], flush=True)
                for ratio in given.ratios:
                    for name, origin in (("of the float model", plain), ("of the quantized model", coded)):
                        found = [skipping(ratio, origin, coded, plain, calls, judge) for calls in shown]
                        rows.append([scheme, ratio, name, *summary(found)])
                        print(rows[-1], flush=True)
    settings = {"model": "zoo/fashion-vlm", "held-out chats": HELD, "seeds": given.seeds, "threads": given.threads}
    write("expert_recalibrated", "Thresholds calibrated before or after quantization", settings, COLUMNS, rows, NOTES)


def skipping(ratio: float, source: Network, coded: Network, plain: Network, calls: Any, judge: ExactMatch) -> dict[str, Any]:
    """Calibrate on one network, judge on the quantized one."""
    (step,) = Recipe.parse({"steps": [{"modes": {"ratio": ratio, "power": 0.25, "points": 24}}]}).steps
    assert isinstance(step.method, Modes)
    with policies.on(coded, [CalibratedPolicy(step, step.method.calibrate(source, calls))]):
        return judge.measure(coded, plain)


def summary(found: list[dict[str, Any]]) -> list[Any]:
    """Means over seeds."""
    kls = [one["kl"] for one in found]
    skipped = [statistics.mean(one["skipped"][phase] for one in found) for phase in ("prefill", "decode")]
    return [*skipped, statistics.mean(kls), f"{len(kls)}: {min(kls):.2g} to {max(kls):.2g}", statistics.mean(one["right"] for one in found)]


if __name__ == "__main__":
    main()
