"""What fewer filters of convolutions cost a UNet of the zoo, and the wall-clock that they save; writes results/structured_filters.json.

python benchmarks/structured_filters.py [--threads 1] [--rounds 15]

Each row compresses the model anew, compares its predictions for inputs that were not calibrated with, and times it in turns with the
original.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from results import write
from structured import in_turns, weights

import aerogel
from aerogel.model.calls import Call
from aerogel.model.network import Network

NAME = "structured_filters"
MODEL = Path(__file__).parent.parent / "zoo" / "fashion-unet"
BATCH = 8
COLUMNS = ["filters removed", "criterion", "repair", "weights left", "relative error of the prediction", "ms", "speed-up"]
NOTES = [
    "Whole groups of the group norms leave in every ResNet block of the UNet; other layers stay as they are.",
    "Relative error: squared difference to the prediction of the original over its square, on noise at random steps, not on images.",
    f"One forward of {BATCH} images; speed-up: median of the ratios of neighbouring turns with the original in one process.",
    "Rows of one share have layers of the same sizes: what they differ by in time is noise.",
]


def calls_of(network: Network, count: int, seed: int) -> list[Call]:
    """Noise and random text at random time steps."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = network.config
    shape = (BATCH, config["in_channels"], config["sample_size"], config["sample_size"])
    return [
        Call(
            (),
            {
                "sample": torch.randn(shape, generator=generator),
                "timestep": torch.randint(0, 1000, (BATCH,), generator=generator),
                "encoder_hidden_states": torch.randn(BATCH, 8, config["cross_attention_dim"], generator=generator),
            },
        )
        for _ in range(count)
    ]


def opened() -> Network:
    """The UNet in float32."""
    return aerogel.load(MODEL, lazy=False, dtype=torch.float32)


@torch.no_grad()
def row(dense: Network, options: dict[str, Any], rounds: int) -> list[Any]:
    """Compress, compare and time."""
    steps = [{"prune_conv_filters": options}]
    network = aerogel.compress(opened(), {"name": "case", "steps": steps}, samples=calls_of(dense, 8, 1), measures=[]).network
    error, size = 0.0, 0.0
    for call in calls_of(dense, 2, 2):
        expected, found = (one.module(**call.kwargs).sample for one in (dense, network))
        error, size = error + float((found - expected).square().sum()), size + float(expected.square().sum())
    (call,) = calls_of(dense, 1, 3)
    seconds, ratio = in_turns(lambda: dense.module(**call.kwargs), lambda: network.module(**call.kwargs), rounds)
    left = round(weights(network) / weights(dense), 3)
    return [f"{options['share']:.0%}", options["criterion"], str(options["repair"]).lower(), left, error / size, 1000 * seconds, ratio]


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dense, rows = opened(), list[list[Any]]()
    for share in (0.25, 0.5):
        for criterion, repair in (("obs", True), ("l1", True), ("l1", False)):
            rows.append(row(dense, {"share": share, "criterion": criterion, "repair": repair}, given.rounds))
            print(*rows[-1], flush=True)
    settings = {"calibration": f"8 x {BATCH} noisy inputs", "dtype": "float32", "threads": given.threads, "rounds": given.rounds}
    write(NAME, "Fewer filters of convolutions, fashion-unet", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
