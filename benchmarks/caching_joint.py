"""Reuse and quantization of the zoo's DiT, made apart and together: error of final pictures; writes benchmarks/results/caching_joint.json.

python benchmarks/caching_joint.py
python benchmarks/caching_joint.py --ratio 0.3 --seeds 0
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from caching import DIT, GUIDANCE, UNSEEN
from results import write

import aerogel
from aerogel.data.denoising import Denoising, record
from aerogel.data.replay import output_of, replays
from aerogel.engine import policies
from aerogel.engine.policies import Measured
from aerogel.methods.diffusion.recalibrate import Recalibrate
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Recipe

STEPS = 10
QUANTIZED: dict[str, list[dict[str, Any]]] = {
    "W8A8": [{"rtn": {"scheme": "W8A16_CHANNEL", "targets": ["Linear", "Conv2d"]}}, {"ranges": {"start": "minmax", "steps": 0}}],
    "W4A8": [{"rtn": {"scheme": "W4A16_CHANNEL_ASYM", "targets": ["Linear", "Conv2d"]}}, {"ranges": {"start": "minmax", "steps": 0}}],
}
NOTES = [
    "Error: mean squared, of final pictures of held-out noise against those of the float network without reuse; median, least and most.",
    "Apart: the schedule of the float network is put on the quantized one. On the quantized: it is made there, against the float network.",
    "Refined: exchanges on the quantized network from the schedule that is there, each confirmed on 128 pictures of other noise.",
    "Then ranges anew: static ranges of inputs are measured once more on the generations that the cache leads to (recalibrate).",
    "Weights are rounded to nearest, inputs have one static range each: what differs between rows is the order alone.",
    "Target: made together, an error below that of both made apart.",
]


def recorded(network: Network, count: int, seed: int, batch: int) -> list[Call]:
    """Generations of the pipeline."""
    return record(network.processor, network.module, Denoising(count=count, steps=STEPS, guidance=GUIDANCE, batch=batch), seed)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument(
        "--by", nargs="+", choices=["searched", "harmonica"], default=["searched", "harmonica"], help="Who makes schedules."
    )
    parser.add_argument("--widths", nargs="+", choices=list(QUANTIZED), default=list(QUANTIZED))
    parser.add_argument("--held", type=int, default=512, help="Held-out pictures; a few of them have most of the error, so 64 are too few.")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain = aerogel.load(DIT, lazy=False)
    unseen = replays(plain, recorded(plain, given.held, UNSEEN, min(given.held, 64)))

    def made_by(network: Network) -> torch.Tensor:
        return torch.cat([run.finish(run.start(), lambda _, call: output_of(network.run(call))) for run in unseen])

    exact = made_by(plain)

    def error(result: Any, others: Any = ()) -> float:
        network = result.network
        with policies.on(network, [*result.policies, *others]):
            return float((made_by(network) - exact).square().mean())

    def refined(network: Network, before: Any, calls: list[Call], seed: int) -> list[Measured]:
        torch.manual_seed(seed)
        (step,) = Recipe.parse({"steps": [{"refined": {"trials": given.trials}}]}).steps
        return [policies.calibrated(network, step, calls, before.policies[-1])]

    makers = {"searched": {"ratio": given.ratio, "trials": given.trials}, "harmonica": {"ratio": given.ratio}}
    rows = []
    for maker in given.by:
        step = {maker: makers[maker]}
        found: dict[tuple[str, str], list[float]] = {}
        for seed in given.seeds:
            calls = recorded(plain, 32, seed, 4 if maker == "harmonica" else 32)

            def made(steps: list[dict[str, Any]], calls: list[Call] = calls, seed: int = seed) -> Any:
                return aerogel.compress(copy.deepcopy(plain), {"steps": steps}, samples=calls, measures=(), seed=seed)

            alone = made([step])
            found.setdefault(("float", "reuse alone"), []).append(error(alone))
            for width, quantizing in ((width, QUANTIZED[width]) for width in given.widths):
                quantized = made(quantizing)
                found.setdefault((width, "no reuse"), []).append(error(quantized))
                found.setdefault((width, "apart"), []).append(error(quantized, alone.policies))
                both = made([*quantizing, step])
                found.setdefault((width, "on the quantized"), []).append(error(both))
                both.network.teacher, both.network.processor = plain, plain.processor
                quantized.network.teacher, quantized.network.processor = plain, plain.processor
                found.setdefault((width, "apart, then refined"), []).append(
                    error(quantized, refined(quantized.network, alone, calls, seed))
                )
                with policies.on(both.network, both.policies):  # as the recipe's next step would
                    Recalibrate("minmax").apply(both.network, calls)
                found.setdefault((width, "on the quantized, then ranges anew"), []).append(error(both))
                again = refined(both.network, both, calls, seed)
                both.policies.pop()
                found.setdefault((width, "alternate: then refined too"), []).append(error(both, again))
            print(maker, seed, {key: values[-1] for key, values in found.items()}, flush=True)
        for (width, order), errors in found.items():
            apart = found.get((width, "apart"))
            ratios = [one / other for one, other in zip(errors, apart, strict=True)] if apart else None
            spread = f"{min(errors):.2g} to {max(errors):.2g}"
            rows.append([maker, width, order, statistics.median(errors), spread, None if ratios is None else statistics.median(ratios)])
    settings = {
        "network": "zoo/fashion-dit, 12 units", "steps": STEPS, "guidance": GUIDANCE, "ratio": given.ratio, "trials": given.trials,
        "seeds": given.seeds, "held-out pictures": given.held, "threads": given.threads, "variance": round(float(exact.var()), 4),
    }  # fmt: skip
    columns = ["made by", "weights and inputs", "order", "error of x0", "least to most", "of that made apart"]
    print(write("caching_joint", "Reuse and quantization, apart and together", settings, columns, rows, NOTES).read_text())


if __name__ == "__main__":
    main()
