"""Images of the Fashion UNet in 4-bit weights and 8-bit inputs, made by onnxruntime and by this package from the same noise.

`python benchmarks/onnx_images.py FOLDER` compresses zoo/fashion-unet into FOLDER/master (where it is not there yet), exports it with codes
of 4 bits packed and with a byte each, and prints how far the images are apart, what the files take, and what a step takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine.exporting import source_of
from aerogel.export.onnx import Onnx
from aerogel.layers.linear import cache_dequantized, timestep_index_of
from aerogel.layers.timestep_index import TimestepIndex
from aerogel.model.hooks import patch_forward

ZOO = Path(__file__).parents[1] / "zoo/fashion-unet"
PROMPTS = ("sneaker", "bag", "coat", "dress")
EIGHT_BITS = dict.fromkeys(("conv_in", "conv_out"), "W8A16_CHANNEL_ASYM")
RECIPE = {
    "name": "unet-w4a8-short",
    "steps": [
        {"tiar": {"scheme": "W4A16_CHANNEL_ASYM", "steps": 1000}},
        {
            "brecq": {
                "scheme": "W4A16_CHANNEL_ASYM",
                "steps": 150,
                "overrides": dict.fromkeys(("conv_in", "conv_out"), "W8A16_CHANNEL_ASYM"),
            }
        },
        {"activation_ranges": {"ignore": ["*time_emb*"], "steps": 50}},
        {"fsc": {}},
    ],
}


def engine(path: Path, index: TimestepIndex, threads: int) -> Callable[..., tuple[Tensor]]:
    """Return a forward of the UNet that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        (row,) = set(index.rows_of(timestep))
        given = {"sample": sample.numpy(), "encoder_hidden_states": encoder_hidden_states.numpy(), "step": np.array(row)}
        return (torch.from_numpy(session.run(None, given)[0]),)

    return forward


Seen = list[tuple[dict[str, Any], Tensor]]


@contextmanager
def recorded(unet: nn.Module, seen: Seen) -> Iterator[None]:
    """Keep the inputs and the answer of every forward."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: tuple[Tensor]) -> None:
        seen.append((dict(zip(("sample", "timestep"), args, strict=False)) | kwargs, answer[0]))

    handle = unet.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def step_error(forward: Callable[..., tuple[Tensor]], seen: Seen) -> dict[str, float]:
    """How far single answers are from those seen, sample by sample, relative to their norm."""
    errors = torch.cat([(forward(**given)[0] - answer).flatten(1).norm(dim=1) / answer.flatten(1).norm(dim=1) for given, answer in seen])
    return {"a step: least": float(errors.min()), "a step: median": float(errors.median()), "a step: largest": float(errors.max())}


@contextmanager
def timed(unet: nn.Module, seconds: list[float]) -> Iterator[None]:
    """Note how long every forward takes."""
    started: list[float] = []
    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())).remove)
        stack.callback(unet.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started[-1])).remove)
        yield


def images(pipeline: Any, count: int) -> tuple[Tensor, float]:
    """Return images (N, 3 or 1, H, W) in [0, 1] of 20 DDIM steps under guidance 2, and the median seconds of a step."""
    generator = [torch.Generator().manual_seed(10_000 + number) for number in range(count)]
    asked = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    seconds: list[float] = []
    with timed(pipeline.unet, seconds):
        made = pipeline(asked, num_inference_steps=20, guidance_scale=2.0, generator=generator, output_type="pt").images
    return made.float(), sorted(seconds)[len(seconds) // 2]


def apart(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far images are apart, in shades of [0, 1]."""
    difference = (ours - theirs).abs()
    return {
        "mean": float(difference.mean()),
        "median of images' largest": float(difference.flatten(1).amax(1).median()),
        "largest": float(difference.max()),
        "PSNR in dB": float(-10 * (ours - theirs).square().mean().log10()),
    }


def main() -> None:
    """Compress, export, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    master = given.folder / "master"
    if not master.exists():
        samples = Denoising(count=16, steps=20, guidance=2.0, prompts=PROMPTS)
        aerogel.compress(str(ZOO), RECIPE, samples=samples, measures=(), output=master)
    graphs = {"packed": given.folder / "packed", "bytes": given.folder / "bytes"}
    for name, folder in graphs.items():
        if not folder.exists():
            Onnx(pack=name == "packed").write(source_of(master), folder)
    network, original = aerogel.load(master), aerogel.load(str(ZOO))
    pipelines = network.processor, original.processor
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    index = timestep_index_of(network.module)
    assert index is not None
    seen: Seen = []
    with cache_dequantized(network.module), recorded(network.module, seen):
        reference, _ = images(pipelines[0], given.count)
    kernels, seconds = images(pipelines[0], given.count)
    float_images, float_seconds = images(pipelines[1], given.count)
    lines: dict[str, Any] = {
        "float": apart(reference, float_images) | {"seconds per step": float_seconds},
        "our kernels": step_error(network.module, seen) | apart(reference, kernels) | {"seconds per step": seconds},
    }
    for name, folder in graphs.items():
        forward = engine(folder / "denoiser.onnx", index, given.threads)
        with patch_forward({network.module: forward}):
            theirs, seconds = images(pipelines[0], given.count)
        lines[f"onnxruntime, {name}"] = step_error(forward, seen) | apart(reference, theirs) | {"seconds per step": seconds}
    weights = "unet/diffusion_pytorch_model.safetensors"
    files = {"original": ZOO / weights, "master": master / weights} | {name: folder / "denoiser.onnx" for name, folder in graphs.items()}
    print(json.dumps({"apart from our reference": lines, "bytes": {name: path.stat().st_size for name, path in files.items()}}, indent=1))


if __name__ == "__main__":
    main()
