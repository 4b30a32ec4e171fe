"""One denoising step of large random-weight networks, float and quantized, in turns; writes benchmarks/results/diffusion_speed.json.

Each network's rows are written as soon as they are there, beside those of the others.

python benchmarks/diffusion_speed.py                 # UNets of Stable Diffusion 1 (860 M), XL (2.6 G) and LDM-4 (400 M); DiT-XL/2 (750 M)
python benchmarks/diffusion_speed.py --only dit --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from results import FOLDER, write
from torch import Tensor, nn

import aerogel
from aerogel.engine import policies
from aerogel.model.calls import Call

STEP, SEED = 500, 0
CACHED = "W8A8, temporal path cached"
ATTENTION = "W8A8, with attention"


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    """Stable Diffusion 1's UNet and a call of both guidance branches at 512 x 512."""
    made = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return made, {"sample": torch.randn(2, 4, 64, 64), "encoder_hidden_states": torch.randn(2, 77, 768)}


def ldm() -> tuple[nn.Module, dict[str, Tensor]]:
    """The UNet of LDM-4 for ImageNet, which TFMQ-DM was measured on, and a call of both guidance branches at 256 x 256."""
    made = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, cross_attention_dim=512, block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3), up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        attention_head_dim=(6, 12, 18, 30),
    )  # fmt: skip
    return made, {"sample": torch.randn(2, 3, 64, 64), "encoder_hidden_states": torch.randn(2, 1, 512)}


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion XL's UNet, made in bfloat16 for want of memory, and a call of both guidance branches at 512 x 512."""
    torch.set_default_dtype(torch.bfloat16)
    made = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)}
    text = torch.randn(2, 77, 2048)
    return made, {"sample": torch.randn(2, 4, 64, 64), "encoder_hidden_states": text, "added_cond_kwargs": added}


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    """DiT-XL/2 and a call of both guidance branches of four images at 256 x 256."""
    made = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2
    )
    return made, {"hidden_states": torch.randn(8, 4, 32, 32), "class_labels": torch.tensor([1, 1000] * 4)}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"unet": unet, "ldm": ldm, "sdxl": sdxl, "dit": dit}
ONE_RANGE = {"activation_ranges": {"start": "minmax", "steps": 0}}
A_STEP = {"fsc": {"scope": "all"}}


def static(bits: int, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights rounded to nearest and ranges of inputs that are known before."""
    return [{"rtn": {"scheme": f"W{bits}A16_CHANNEL", "targets": ["Linear", "Conv2d"]}}, inputs]


RECIPES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "unet": {**{f"W{bits}A8": static(bits, A_STEP) for bits in (8, 4)}, ATTENTION: [{"attention_quant": {}}, *static(8, A_STEP)]},
    "ldm": {f"W{bits}A8": static(bits, A_STEP) for bits in (8, 4)},
    "sdxl": {"W8A8": static(8, ONE_RANGE)},  # its time path knows the image's size: no ranges by step
    "dit": {
        **{f"W{bits}A8, one scale per token": [{"rtn": {"scheme": f"W{bits}A8"}}] for bits in (8, 4)},
        **{f"W{bits}A8": static(bits, ONE_RANGE) for bits in (8, 4)},
    },
}

Turns = dict[str, Callable[[], object]]


def variants(name: str) -> tuple[Turns, int]:
    """What takes turns, and the parameters of the network."""
    torch.manual_seed(SEED)
    base, inputs = NETWORKS[name]()
    base.eval().requires_grad_(False)
    inputs["timestep"] = torch.full((len(next(iter(inputs.values()))),), STEP)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    half = base if next(base.parameters()).dtype == torch.bfloat16 else copy.deepcopy(base).bfloat16()
    return {**floats(name, base, half, inputs), **quantized(name, half, inputs)}, parameters


def floats(name: str, base: nn.Module, half: nn.Module, inputs: dict[str, Any]) -> Turns:
    """The network in float32, where it was made in it, and bfloat16; in that UNets in both orders of memory, DiT compiled too."""
    turns: Turns = {}
    for module in dict.fromkeys((base, half)):
        dtype = next(module.parameters()).dtype
        label = str(dtype).removeprefix("torch.")
        turns[label] = forward(module, inputs, dtype)
        if name != "dit" and module is half:
            last = copy.deepcopy(module).to(memory_format=torch.channels_last)
            turns[f"{label}, channels last"] = forward(last, inputs, dtype, last=True)
    if name == "dit":
        turns["bfloat16, compiled"] = forward(compiled(half), inputs, torch.bfloat16)
    return turns


def quantized(name: str, half: nn.Module, inputs: dict[str, Any]) -> Turns:
    """The recipes; the first UNet recipe with its temporal path cached too, and one scale per token compiled."""
    turns, unets = {}, name != "dit"
    cached = [{"temporal_cache": {"content": "path"}}] if name in ("unet", "ldm") else []
    calls = [Call((), cast(inputs, torch.bfloat16))]
    for label, steps in RECIPES[name].items():
        result = aerogel.compress(copy.deepcopy(half), {"steps": [*steps, *cached]}, samples=calls, measures=())
        turns[label] = forward(result.network.module, inputs, torch.bfloat16, last=unets)
        if cached and label == "W8A8":
            turns[CACHED] = forward(result.network.module, inputs, torch.bfloat16, last=True, on=(result.network, result.policies))
        if label == ATTENTION:
            turns[label] = forward(result.network.module, inputs, torch.bfloat16, last=True, on=(result.network, result.policies[:1]))
        if "token" in label:
            turns[f"{label}, compiled"] = forward(compiled(result.network.module), inputs, torch.bfloat16)
    return turns


def compiled(transformer: nn.Module) -> nn.Module:
    """A copy whose blocks are compiled, all of them by one compilation."""
    made = copy.deepcopy(transformer)
    for block in made.get_submodule("transformer_blocks").children():
        block.compile(fullgraph=True)
    return made


def cast(given: Any, dtype: torch.dtype) -> Any:
    """Float tensors, also in dictionaries, in another dtype; the rest as it is."""
    if isinstance(given, dict):
        return {key: cast(value, dtype) for key, value in given.items()}
    return given.to(dtype) if given.is_floating_point() else given


def forward(module: nn.Module, inputs: dict[str, Any], dtype: torch.dtype, last: bool = False, on: Any = None) -> Callable[[], object]:
    """One forward, to be called again and again; with `on`, (network, policies), these are on while it lasts."""
    given = cast(inputs, dtype)
    if last:
        given["sample"] = given["sample"].to(memory_format=torch.channels_last)

    def turn() -> float:
        with torch.no_grad(), policies.on(*on) if on else nullcontext():
            start = time.perf_counter()
            module(**given)
            return time.perf_counter() - start

    return turn


def measure(name: str, rounds: int) -> list[list[Any]]:
    """Rows of one network: medians, and ratios within each round to the fastest float variant."""
    turns, parameters = variants(name)
    for turn in turns.values():
        turn()  # packs weights and tries kernels
    seconds: dict[str, list[float]] = {label: [] for label in turns}
    for _ in range(rounds):
        for label, turn in turns.items():
            seconds[label].append(turn())  # type: ignore[arg-type]
    floats = [label for label in turns if "float" in label]
    fastest = min(floats, key=lambda label: statistics.median(seconds[label]))
    return [
        [name, f"{parameters / 1e6:.0f} M", label, statistics.median(taken),
         statistics.median(a / b for a, b in zip(seconds[fastest], taken, strict=True))]
        for label, taken in seconds.items()
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {
        "unet": "Stable Diffusion 1's shape, 2 x 4 x 64 x 64 latents and 77 x 768 text",
        "ldm": "LDM-4's, 2 x 3 x 64 x 64 latents and one class of 512",
        "sdxl": "Stable Diffusion XL's, 2 x 4 x 64 x 64 latents and 77 x 2048 text",
        "dit": "DiT-XL/2's, 8 x 4 x 32 x 32 latents (256 tokens each)", "seed": SEED,
        "rounds": given.rounds, "threads": given.threads,
    }  # fmt: skip
    notes = [
        "Random weights; both guidance branches in one batch. All variants alternate in one process, and ratios are taken within a round.",
        "Rows of one model are from one run. Different models may be from different runs and are comparable only on the same processor.",
        "The largest model was measured in bfloat16 only: in float32 it does not fit into 24 GB together with the others.",
        "Quantized models compute in bfloat16 outside their integer layers. W4 weights are converted to int8 for the matrix product.",
        (
            "Inputs have static ranges: one per step in unet and ldm, one per tensor in sdxl and dit, or one scale per "
            "token where the row says so."
        ),
        (
            "With attention: attention operands are quantized to 8 bits too, with integer products where that was faster. "
            "Other rows use torch attention in bfloat16."
        ),
        "Compiled: each transformer block with torch.compile. Static ranges use oneDNN, which is not traced.",
        "Target: at least 1.5 times the fastest float variant, and no measurable time for a cached temporal path.",
    ]
    columns = ["model", "parameters", "variant", "seconds per step", "times the fastest float"]
    path = FOLDER / "diffusion_speed.json"
    for name in [given.only] if given.only else NETWORKS:
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = sorted(
            [*(row for row in before if row[0] != name), *measure(name, given.rounds)], key=lambda row: list(NETWORKS).index(row[0])
        )
        print(write(path.stem, "One denoising step on a CPU", settings, columns, rows, notes).read_text(), flush=True)


if __name__ == "__main__":
    main()
