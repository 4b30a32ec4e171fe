"""What quantizing the zoo's denoisers costs in images and takes in time; writes benchmarks/results/diffusion_quality_NAME.json.

python benchmarks/diffusion_quality.py unet                         # every row: hours; each is written as soon as it is there
python benchmarks/diffusion_quality.py unet --only "W4A8 tfmq" --steps 100
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import torch
from results import FOLDER, write

import aerogel
from aerogel.data.denoising import Denoising, ImageBatch, generate_images, record
from aerogel.engine import policies
from aerogel.engine.result import Result
from aerogel.evaluate import features, image_quality
from aerogel.evaluate.reference import Reference
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.images import ssim

ZOO = Path(__file__).parents[1] / "zoo"
CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
STEPS, SHOWN = 20, 10
GUIDANCE = {"unet": 2.0, "dit": 1.5}
JUDGES = {"fashion-judge": str(ZOO / "fashion-judge"), "efficientnet-lite0@128": "efficientnet-lite0@128"}
LAYERS = ["Linear", "Conv2d"]
COVERAGE = {
    "unet": "All rows except W4A32 quantize all layers with 8-bit inputs and 8-bit attention operands. rtn rows involve no learning.",
    "dit": (
        "All rows quantize all linear layers. The patch embedding and attention operands are not quantized. "
        "In brecq rows the single range is learned."
    ),
}


def weights(bits: int) -> str:
    """Asymmetric channels, save for eight bits, which are as good without a zero point and multiply faster."""
    return "W8A16_CHANNEL" if bits == 8 else f"W{bits}A16_CHANNEL_ASYM"


def nearest(bits: int, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rounding to nearest, with inputs quantized by the given steps."""
    return {"steps": [{"rtn": {"scheme": weights(bits), "targets": LAYERS}}, *inputs]}


def linears(bits: int, method: str, *ranges: dict[str, Any] | None) -> dict[str, Any]:
    """All linear layers of a transformer with symmetric channels; inputs float, with static ranges, or (None) one scale per token."""
    scheme = f"W{bits}A8" if None in ranges else f"W{bits}A16_CHANNEL"
    return {
        "steps": [
            {method: {"scheme": scheme, "targets": ["Linear"]}},
            *({"activation_ranges": options} for options in ranges if options is not None),
        ]
    }


ONE_RANGE = [{"attention_quant": {}}, {"activation_ranges": {"start": "minmax", "steps": 0}}]
A_STEP = [{"attention_quant": {}}, {"fsc": {"scope": "all"}}]

ROWS: dict[str, dict[tuple[str, str], Any]] = {
    "unet": {
        ("W4A32", "rtn"): nearest(4, []),
        ("W4A32", "qdiffusion"): {"steps": [{"brecq": {"scheme": weights(4)}}]},
        ("W4A32", "tfmq"): "tfmq-w4a32",
        ("W8A8", "rtn, one range"): nearest(8, ONE_RANGE),
        ("W8A8", "rtn, one range per step"): nearest(8, A_STEP),
        ("W8A8", "qdiffusion"): ("qdiffusion-w4a8", [f"brecq.scheme={weights(8)}"]),
        ("W8A8", "tfmq"): "tfmq-w8a8",
        ("W4A8", "rtn, one range"): nearest(4, ONE_RANGE),
        ("W4A8", "qdiffusion"): "qdiffusion-w4a8",
        ("W4A8", "tfmq"): "tfmq-w4a8",
        ("W4A8", "tfm cache"): "tfm-w4a8-cache",
        ("W4A8", "tfm select"): "tfm-w4a8-select",
        ("W3A8", "qdiffusion"): ("qdiffusion-w4a8", [f"brecq.scheme={weights(3)}"]),
        ("W3A8", "tfmq"): ("tfmq-w4a8", [f"brecq.scheme={weights(3)}", f"tiar.scheme={weights(3)}"]),
    },
    "dit": {
        ("W4A32", "rtn"): linears(4, "rtn"),
        ("W4A32", "brecq"): linears(4, "brecq"),
        **{
            (f"W{bits}A8", f"{method}, {name}"): linears(bits, method, inputs)
            for bits, method in ((8, "rtn"), (4, "rtn"), (4, "brecq"), (3, "brecq"))
            for name, inputs in (("one range", {"start": "minmax", "steps": 0} if method == "rtn" else {}), ("one scale per token", None))
        },
    },
}


def pipeline_of(name: str) -> Any:
    """The zoo's pipeline in float32."""
    if not (ZOO / f"fashion-{name}").exists():
        raise SystemExit(f"zoo/fashion-{name} is not there; train it: python zoo/fashion_{name}.py")
    opened = diffusers.DiffusionPipeline.from_pretrained(ZOO / f"fashion-{name}", dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


def denoiser(pipeline: Any) -> str:
    """The name of the denoiser in its pipeline."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def overrides(recipe: Any, given: argparse.Namespace) -> list[str]:
    """Overrides for the methods of this recipe: how long they fit."""
    used = {step.name for step in aerogel.Recipe.parse(recipe).steps}
    fits = {"brecq": (given.steps, given.rate), "activation_ranges": (max(1, given.steps // 4), 4e-4 if given.steps >= 1000 else 4e-3)}
    return [
        f"{name}.{key}={value}" for name, pair in fits.items() if name in used for key, value in zip(("steps", "rate"), pair, strict=True)
    ]


def compress(pipeline: Any, recipe: Any, calls: list[Call], given: argparse.Namespace) -> tuple[Network, Result, float]:
    """A network in a pipeline of its own, and the seconds it took."""
    recipe, more = recipe if isinstance(recipe, tuple) else (recipe, [])
    own = copy.copy(pipeline)
    module = copy.deepcopy(getattr(pipeline, denoiser(pipeline)))
    setattr(own, denoiser(own), module)
    fitted = [] if isinstance(recipe, dict) and "brecq" not in str(recipe) else overrides(recipe, given)
    start = time.perf_counter()
    result = aerogel.compress(module, recipe, overrides=[*fitted, *more], samples=calls, measures=())
    return Network(result.network.module, result.network.family, processor=own), result, time.perf_counter() - start


def images_of(network: Network, given: argparse.Namespace, seed: int) -> ImageBatch:
    """Images that differ by this seed's noise only, from network to network."""
    prompts = CLASSES if denoiser(network.processor) == "unet" else ()
    wanted = Denoising(given.images, STEPS, GUIDANCE[given.network], prompts, batch=50)
    made = list(generate_images(network.processor, wanted, 100 + seed))
    return ImageBatch(torch.cat([some.images_NCHW for some in made]), tuple(name for some in made for name in some.subjects))


def figures(made: ImageBatch, original: ImageBatch) -> dict[str, float]:
    """Figures of images: against the float network's of the same noise, and against real images."""
    found: dict[str, float] = {}
    if made is not original:
        found["mse"] = float((made.images_NCHW - original.images_NCHW).square().mean())
        found["ssim"] = float(ssim(made.images_NCHW, original.images_NCHW).mean())
    for name, folder in JUDGES.items():
        judge, real = features.load(folder, torch.device("cpu")), Reference.load(ZOO / f"reference/{name}.safetensors")
        real.check(judge)
        sights = [judge.look(some_NCHW)._replace(maps=()) for some_NCHW in made.images_NCHW.split(50)]
        found |= {f"{figure}[{name}]": value for figure, value in image_quality.figures(real, judge, sights, list(made.subjects)).items()}
    return found


def rows_of(name: str, given: argparse.Namespace) -> Iterator[list[Any]]:
    """A row a method: its scheme and name, seconds, then means and standard deviations over seeds."""
    pipeline = pipeline_of(name)
    module = getattr(pipeline, denoiser(pipeline))
    original = Network(module, aerogel.load(module).family, processor=pipeline)
    theirs = [images_of(original, given, seed) for seed in range(given.seeds)]
    yield ["float", "", None, *_summary([figures(made, made) for made in theirs])]
    prompts = CLASSES if denoiser(pipeline) == "unet" else ()
    calls = record(pipeline, module, Denoising(SHOWN, STEPS, GUIDANCE[name], prompts, SHOWN))
    for (scheme, method), recipe in ROWS[name].items():
        if not any(fnmatch(f"{scheme} {method}", f"*{only}*") for only in given.only):
            continue
        network, result, taken = compress(pipeline, recipe, calls, given)
        with policies.on(network, result.policies):
            ours = [images_of(network, given, seed) for seed in range(given.seeds)]
        yield [scheme, method, round(taken), *_summary([figures(*pair) for pair in zip(ours, theirs, strict=True)])]


TARGET = ("Target at W4A8: distances of the best recipe at most 10 % above float and not above qdiffusion, accuracy within one point.",)
FIGURES = ("mse", "ssim", "frechet[fashion-judge]", "frechet[efficientnet-lite0@128]", "accuracy[fashion-judge]")


def _summary(found: list[dict[str, float]]) -> list[str | None]:
    cells: list[str | None] = []
    for figure in FIGURES:
        values = [one[figure] for one in found if figure in one]
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4g}{spread}" if values else None)
    return cells


def main() -> None:
    """Measure the rows that are asked for and put them into the results, beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(ROWS))
    parser.add_argument("--only", nargs="*", default=[""], help="Rows whose scheme and name hold one of these (globs).")
    parser.add_argument("--steps", type=int, default=1000, help="Optimiser steps a block; a quarter of them for learned ranges.")
    parser.add_argument("--rate", type=float, default=0.01, help="Learning rate of the rounding; 0.001 for 20,000 steps.")
    parser.add_argument("--seeds", type=int, default=5, help="Sets of images, each from noise of its own; the calibration is the same.")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--dry", action="store_true", help="Print, do not write.")
    given = parser.parse_args()
    columns = ["scheme", "method", "seconds", "MSE to float", "SSIM to float", *FIGURES[2:]]
    path = FOLDER / f"diffusion_quality_{given.network}.json"
    settings = {
        "calibration": f"{SHOWN} images, {STEPS} DDIM steps, guidance {GUIDANCE[given.network]:g}",
        "optimiser steps per block": given.steps, "rate": given.rate, "seeds": given.seeds, "images per seed": given.images,
    }  # fmt: skip
    notes = [
        "Means and standard deviations over noise seeds, after one calibration. Pixel values are from 0 to 1.",
        COVERAGE[given.network],
        "Fréchet distances are comparable only within a column: they use few images and this reference.",
        "Rows are from several runs. Seconds may be from different, shared machines and show the order of magnitude only.",
        *(TARGET if given.network == "unet" else ()),
    ]
    for row in rows_of(given.network, given):
        print(json.dumps(row), flush=True)
        if not given.dry:
            before = json.loads(path.read_text())["rows"] if path.exists() else []
            kept = [old for old in before if old[:2] != row[:2]]
            order = [["float", ""], *(list(key) for key in ROWS[given.network])]
            rows = sorted([*kept, row], key=lambda one: order.index(one[:2]))
            write(path.stem, f"Quantized fashion-{given.network} against float", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
