"""What skipped experts cost in answers, MoDES beside its rivals on the zoo's mixture; writes benchmarks/results/expert_skipping.json.

python benchmarks/expert_skipping.py                     # three calibration seeds, four ratios; an hour on one thread, rows as they come
python benchmarks/expert_skipping.py --seeds 0 --ratios 0.67 --only modes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, write

import aerogel
from aerogel.data import chats
from aerogel.data.chats import Chat
from aerogel.engine import policies
from aerogel.engine.policies import CalibratedPolicy
from aerogel.evaluate.exact_match import ExactMatch
from aerogel.model.network import Network
from aerogel.recipe import Recipe
from aerogel.runtime.expert_skipping.thresholds import UnreachableError

ZOO = Path(__file__).parents[1] / "zoo"
sys.path.insert(0, str(ZOO))
import collages  # noqa: E402

CALIBRATION, HELD, UNSEEN = 64, 192, 99
RATIOS, SEEDS, POWERS = (0.5, 0.67, 0.75, 0.8), (0, 1, 2), (0.0, 0.1, 0.25, 0.5, 1.0)
COLUMNS = [
    "target ratio", "policy", "assignments skipped in prompts", "in answers", "tokens without experts", "KL, nats per answer token",
    "seeds: min to max", "exact match", "relative to no skipping", "seconds to calibrate",
]  # fmt: skip
NOTES = [
    "Calibrated on chats about one half of the held-out items, evaluated on chats about the other half; means over calibration seeds.",
    "KL divergence between predictions without and with expert skipping, over answer tokens. Exact match compares complete answers.",
    (
        "The ratio is relative to all token-expert assignments except padding. Special tokens count, although they "
        "keep their experts. Policies meet the ratio on the calibration chats."
    ),
    (
        "naee, odp, diep and reduced_topk keep the best expert and are limited to the ratio shown. reduced_topk uses "
        "the k that meets the ratio."
    ),
    "GMLG alone: MoDES with one threshold and one importance for text and images. DMT alone: two thresholds without importance.",
    "Seconds are processor time. Evaluations are shared between ratios and between powers.",
    (
        "Power 1 is the published score. By calibration: the power of 0, 0.1, 0.25, 0.5 and 1 with the lowest KL "
        "divergence on the calibration chats."
    ),
    (
        "With top-4 routing a ratio of 0.75 is three experts. A tenth of the assignments belong to special tokens, so "
        "beyond 0.8 few assignments remain to distinguish policies."
    ),
]  # fmt: skip


def contenders(ratio: float, keep: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and step."""
    kept = {"ratio": ratio, "points": 24}
    yield "modes, power by calibration", {"modes": {**kept, "power": list(POWERS), "evaluations": str(keep / "both")}}
    for power in (1.0, 0.25):
        own = {**kept, "power": power}
        yield f"modes, power {power:g}", {"modes": {**own, "evaluations": str(keep / "both")}}
        alone = {**own, "importance": "layer", "thresholds": "single"}
        yield f"GMLG alone, power {power:g}", {"modes": {**alone, "evaluations": str(keep / "gmlg")}}
    yield "DMT alone", {"modes": {**kept, "importance": "none", "evaluations": str(keep / "dmt")}}
    yield "single_threshold (neither)", {"single_threshold": {"ratio": ratio}}
    yield "reduced_topk", {"reduced_topk": {"ratio": ratio}}
    for name in ("naee", "odp", "diep"):
        yield name, {name: {"ratio": ratio}}
    yield "naee, not renormalised", {"naee": {"ratio": ratio, "renormalise": False}}


class Bench:
    """The network, and what it is judged on."""

    def __init__(self, keep: Path) -> None:
        self.network: Network = aerogel.load(ZOO / "fashion-vlm", lazy=False)
        self.whole: Network = aerogel.load(ZOO / "fashion-vlm", lazy=False)
        self.keep = keep
        self.source = collages.write(collages.draw(collages.Items.held_out(1), HELD, UNSEEN), keep / "held")
        self.right = self.judge(self.network)["right"]

    def chats(self, seed: int) -> list[Chat]:
        """Chats to calibrate on."""
        return chats.read(collages.write(collages.draw(collages.Items.held_out(0), CALIBRATION, seed), self.keep / f"seed{seed}"))

    def judge(self, network: Network) -> dict[str, Any]:
        """Replies and predictions beside the whole network's."""
        return ExactMatch(source=str(self.source), count=HELD, batch=32).measure(network, self.whole)

    def run(self, step: dict[str, Any], seed: int, ratio: float) -> dict[str, Any]:
        """Calibrate and judge; a rule that cannot drop so much drops what it can."""
        (made,) = Recipe.parse({"steps": [step]}).steps
        calls = chats.calls(self.chats(seed), self.network.processor)
        start = time.process_time()
        try:
            state = made.method.calibrate(self.network, calls)
        except UnreachableError as error:
            ((name, options),) = step.items()
            return self.run({name: {**options, "ratio": error.most - 0.002}}, seed, ratio)
        taken = time.process_time() - start
        with policies.on(self.network, [CalibratedPolicy(made, state)]):
            return self.judge(self.network) | {"seconds": taken}


def row(ratio: float, label: str, found: list[dict[str, Any]], whole: float) -> list[Any]:
    """Means over seeds."""
    kls = [one["kl"] for one in found]
    skipped = [[one["skipped"][key] for one in found] for key in ("prefill", "decode", "dropped_tokens")]
    right = statistics.mean(one["right"] for one in found)
    spread = f"{len(kls)}: {min(kls):.2g} to {max(kls):.2g}"
    means = [statistics.mean(values) for values in skipped]
    return [ratio, label, *means, statistics.mean(kls), spread, right, right / whole, statistics.median(one["seconds"] for one in found)]


def keep(new: list[Any], settings: dict[str, Any]) -> None:
    """Write a row among those that are there."""
    path = FOLDER / "expert_skipping.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [*(old for old in before if old[:2] != new[:2]), new]
    write(path.stem, "Expert skipping: MoDES and baselines", settings, COLUMNS, sorted(rows, key=lambda one: (one[0], one[5])), NOTES)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        settings = {
            "model": "zoo/fashion-vlm, 6 layers of 16 experts, top-4", "exact match without skipping": round(bench.right, 4),
            "calibration chats": CALIBRATION, "held-out chats": HELD, "threads": given.threads,
        }  # fmt: skip
        print(settings, flush=True)
        for ratio in given.ratios:
            for label, _ in contenders(ratio, bench.keep):
                if given.only and label not in given.only:
                    continue
                found = []
                for seed in given.seeds:
                    (bench.keep / f"e{seed}").mkdir(exist_ok=True)
                    found.append(bench.run(dict(contenders(ratio, bench.keep / f"e{seed}"))[label], seed, ratio))
                made = row(ratio, label, found, bench.right)
                print(made, flush=True)
                keep(made, settings)


if __name__ == "__main__":
    main()
