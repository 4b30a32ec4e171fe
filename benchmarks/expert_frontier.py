"""The walk for two thresholds beside a look at all pairs, on the zoo's mixture; writes benchmarks/results/expert_frontier.json.

python benchmarks/expert_frontier.py                 # 20 x 20 thresholds, four ratios: five minutes on one thread
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from expert_skipping import ZOO, collages
from results import write

import aerogel
from aerogel.data import chats
from aerogel.errors import AerogelError
from aerogel.methods.experts.modes import Modes

COLUMNS = ["ratio", "search", "evaluations", "seconds", "KL, nats", "assignments skipped", "KL violations", "ratio violations"]
NOTES = [
    (
        "Thresholds follow the quantiles of the scores. All combinations are evaluated once for all ratios; the "
        "seconds are those of that evaluation."
    ),
    (
        "Both searches assume that KL divergence and ratio do not decrease as a threshold grows. The last columns "
        "count neighbouring evaluations that violate this."
    ),
]


def main() -> None:
    """Search and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.67, 0.75, 0.8])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network, rows, looked = aerogel.load(ZOO / "fashion-vlm", lazy=False), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        source = collages.write(collages.draw(collages.Items.held_out(0), given.chats, 0), Path(folder) / "chats")
        calls = chats.calls(chats.read(source), network.processor, batch=16)
        for ratio in given.ratios:
            for exhaustive in (True, False):
                kept = str(Path(folder) / "all") if exhaustive else ""
                method = Modes(ratio=ratio, power=0.25, points=given.points, exhaustive=exhaustive, evaluations=kept)
                start = time.perf_counter()
                try:
                    state = method.calibrate(network, calls)
                except AerogelError as error:
                    print(ratio, error, flush=True)
                    break
                taken = time.perf_counter() - start
                looked = max(looked, taken) if exhaustive else looked
                fell, name = state.against_monotony, "all combinations" if exhaustive else "border walk"
                seconds = looked if exhaustive else taken
                rows.append([ratio, name, state.evaluations, seconds, state.kl, state.skipped, fell["error"], fell["ratio"]])
                print(rows[-1], flush=True)
    settings = {
        "model": "zoo/fashion-vlm",
        "thresholds per modality": given.points,
        "chats": given.chats,
        "threads": given.threads,
        "seed": 0,
    }
    write("expert_frontier", "Threshold search: border walk against all combinations", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
