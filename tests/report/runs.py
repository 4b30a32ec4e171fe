"""Records of runs for the report's tests, the fullest and the least; `python tests/report/runs.py FOLDER` writes them."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from aerogel.io.older import SCHEMA

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MINIMAL: dict[str, Any] = {"model": {"name": "my-model"}, "recipe": {"steps": []}, "metrics": {}}
REST = {"embeddings": 56_623_104, "norms and others": 70_272}
BENCH = {"batch": 1, "prompt": 512, "new_tokens": 64, "threads": 2, "device": "cpu"}
TEXT = {"tokens": 16383, "source": "sotu-held-out", "length": 1024, "stride": 512, "fingerprint": "sha256:aa"}
SAMPLES = [
    {
        "prompt": "Explain in two sentences why the sky is blue.",
        "original": "The sky is blue because of scattering. Sunlight is scattered by the gases in the air, and blue light most.",
        "text": "The sky is blue because of scattering. The light of the sun is scattered by the air, and blue most of all.",
        "same": 14,
        "tokens": 48,
    },
    {"prompt": "What is 17 plus 26?", "original": "17 + 26 = <b>43</b>", "text": "17 + 26 = <b>43</b>", "same": 12, "tokens": 12},
    {
        "prompt": "Write <script>alert(1)</script> backwards & forwards.",
        "original": "I can't do that.",
        "text": "<script>alert('no')</script> is what you asked for.",
        "same": 0,
        "tokens": 48,
    },
]


def full(
    recipe: str = "gptq-w4a16", scheme: str = "W4A16_G64", perplexity: float = 25.31, size: int = 87_412_336, speed: float = 58.4
) -> dict[str, Any]:
    """A record with every part; the numbers are made up."""
    chance = random.Random(0)
    journal = [
        {
            "name": f"model.layers.{block}.{linear}",
            "block": f"model.layers.{block}",
            "method": "gptq",
            "scheme": scheme,
            "error": 0.02 * (1 + 0.6 * math.sin(index) + block / 20) * chance.uniform(0.8, 1.25),
            "fallback": "the Hessian could not be factorised at damping 0.1" if (block, index) == (1, 6) else None,
            "damping": 0.01,
        }
        for block in range(30)
        for index, linear in enumerate(LINEARS)
    ]
    return {
        "schema": SCHEMA,
        "model": {"name": "smollm2-135m", "family": "llama", "parameters": 134_515_008, "dtype": "bfloat16"},
        "recipe": {"name": recipe, "steps": [{"gptq": {"scheme": scheme, "ignore": ["lm_head"], "percdamp": 0.01, "overrides": {}}}]},
        "provenance": {
            "date": "2026-11-23T06:12:00+00:00",
            "seed": 0,
            "versions": {"aerogel": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"device": "cpu", "processor": "x86_64", "threads": 2, "memory_bytes": 25_769_803_776},
            "calibration": {"source": "sotu", "count": 128, "length": 512, "fingerprint": "sha256:" + "3b" * 32},
        },
        "metrics": {
            "original": {
                "size": {
                    "disk_bytes": 269_060_552,
                    "stored_bytes": 269_030_016,
                    "bits_per_weight": 16.0,
                    "parts": {"unquantized layers": 212_336_640, **REST},
                },
                "perplexity": {"perplexity": 24.02, "nats_per_token": math.log(24.02), **TEXT},
                "speed": {"prefill_tokens_per_second": 512.0, "decode_tokens_per_second": 37.2, "peak_memory_bytes": 721_000_000, **BENCH},
            },
            "compressed": {
                "size": {
                    "disk_bytes": size,
                    "stored_bytes": size - 30_000,
                    "bits_per_weight": 8 * size / 134_515_008,
                    "parts": {"quantized layers": size - 56_723_376, **REST},
                },
                "perplexity": {"perplexity": perplexity, "nats_per_token": math.log(perplexity), **TEXT},
                "kl_divergence": {"kl": 0.0412, "top1": 0.9013, **TEXT},
                "generation": {"samples": copy.deepcopy(SAMPLES), "same_share": 0.43},
                "speed": {"prefill_tokens_per_second": 498.0, "decode_tokens_per_second": speed, "peak_memory_bytes": 402_000_000, **BENCH},
            },
        },
        "journal": journal,
        "kept": [
            {"name": "model.embed_tokens", "parameters": 28_311_552, "reason": "an embedding, not a linear"},
            {"name": "lm_head", "parameters": 28_311_552, "reason": "ignored by the recipe"},
            *({"name": f"model.layers.{block}.mlp.gate", "parameters": 576, "reason": "kept by the family"} for block in (0, 1, 2)),
        ],
        "plan": {"layers": 210, "share_reached": 0.789},
        "timings": {"load": 3.1, "compress": 171.0, "save": 2.0, "evaluate": 88.0},
    }


# A dark and a light PNG of 4 x 4 pixels.
_PNGS = (
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAGElEQVR4nGPUYGBgYGJYz8DACGExMDAAAA2dAQYTr2eYAAAAAElFTkSuQmCC",
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAGElEQVR4nGM8wcDAwMSQz8DACGExMDAAABvdAgbVWdeOAAAAAElFTkSuQmCC",
)


def temporal(layers: int = 5, steps: int = 20) -> dict[str, Any]:
    """Temporal features of which that of the second block at the third step is nearer to another step; the other numbers are made up."""
    names = [f"{place}.resnets.0.time_emb_proj" for place in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")]
    errors = [[0.001 * (1 + layer) * (1 + step) for step in range(steps)] for layer in range(layers)]
    return {
        "sampler": "DDIMScheduler",
        "steps": [float(999 - 999 // steps * step) for step in range(steps)],
        "layers": names[:layers],
        "errors": errors,
        "cosines": [[1 - error / 2 for error in row] for row in errors],
        "mismatches": [[(layer, step) == (1, 2) for step in range(steps)] for layer in range(layers)],
        "error": 0.0315,
        "cosine": 0.98425,
        "least_cosine": 0.95,
        "mismatch": 1 / layers / steps,
    }


def schedule() -> dict[str, Any]:
    """A schedule of two blocks and four steps, one of which is cached as a whole; the numbers are made up."""
    state = {
        "steps": [900.0, 600.0, 300.0, 0.0],
        "sampler": "DDIMScheduler",
        "modules": [f"blocks.{block}.{part}" for block in range(2) for part in ("<b>attn", "ff")],
        "computed": ["1111", "1101", "0000", "1111"],
        "error": 0.00123,
        "log": [],
    }
    return {"step": {"harmonica": {"ratio": 0.3}}, "state": state}


def answers() -> dict[str, Any]:
    """The exact match of an MoE model with skipped experts."""
    skipped = {
        "prefill": 0.7,
        "decode": 0.45,
        "dropped_tokens": 0.21,
        "layers": [[0.1, 0.5], [0.9, 1.0]],
        "dropped_tokens_by_layer": [0.0, 0.42],
    }
    return {"right": 0.81, "count": 128, "source": "/some/where/held-out.jsonl", "kl": 0.012, "top1": 0.98, "skipped": skipped}


def inputs() -> dict[str, Any]:
    """The error of 8-bit inputs of two blocks and of the layers around them; the numbers are made up."""
    layers = ["proj_in", *(f"blocks.{block}.<b>to_q</b>" for block in range(2)), "proj_out"]
    return {
        "layers": layers,
        "one": [0.002, 0.01, 0.03, 0.0],
        "step": [0.002] * 4,
        "channel": [0.001] * 4,
        "token": [0.001, 0.002, 0.002, 0.0],
    }


def coverage() -> dict[str, Any]:
    """A coverage with everything in it: 10 layers, some with quantized weights, fewer with quantized inputs."""
    weights = ["conv_in", "conv_out", *(f"up_blocks.{block}.resnets.0.conv_shortcut" for block in range(3))]
    return {
        "layers": 10,
        "weights": {"int4": 5},
        "inputs": {"int8, one range a step": 4},
        "unquantized_weights": weights,
        "unquantized_inputs": ["mid_block.<b>conv</b>", *weights],
        "attentions": [f"mid_block.attentions.0.transformer_blocks.0.attn{number}" for number in (1, 2)],
    }


def images() -> dict[str, Any]:
    """A record of a network that makes images; the numbers are made up."""
    made = {"count": 256, "steps": 20, "guidance": 2.0, "seed": 0}
    real = {"reference": "the test set of Fashion-MNIST", "real_images": 10_000, **made}
    pairs = [
        {"subject": f"a <b>{name}</b>", "original": _PNGS[0], "compressed": _PNGS[number % 2]}
        for number, name in enumerate(("bag", "boot"))
    ]
    figures = {"frechet": 3.21, "spatial_frechet": 1.5, "inception_score": 8.5, "precision": 0.71, "recall": 0.62, "accuracy": 0.955}
    content = full("unet-w4")
    content["model"] = {"name": "fashion-unet", "family": "unet", "parameters": 3_700_000, "dtype": "float16"}
    for side in content["metrics"].values():
        for measure in ("perplexity", "kl_divergence", "generation", "speed"):
            side.pop(measure, None)
    content["metrics"]["original"]["image_quality"] = {f"{name}[fashion-judge]": value for name, value in figures.items()} | real
    worse = {name: (1.1 if "frechet" in name else 0.9) * value for name, value in figures.items()}
    content["metrics"]["compressed"]["image_quality"] = {f"{name}[fashion-judge]": value for name, value in worse.items()} | real
    content["metrics"]["compressed"]["image_similarity"] = {
        "mse": 0.0031, "psnr": 25.1, "ssim": 0.913, "perceptual[efficientnet-lite0, unlearned]": 0.0712, **made, "pairs": pairs,
    }  # fmt: skip
    content["metrics"]["compressed"] |= {"temporal": temporal(), "inputs": inputs()}
    content["coverage"] = coverage()
    return content


def folders(root: Path) -> Path:
    """Write the full run and its neighbours; return the full run's folder."""
    neighbours = {
        "rtn-w4a16": full("rtn-w4a16", perplexity=27.9, speed=58.1),
        "gptq-w3a16": full("gptq-w3a16", "W3A16_G64", 31.7, 75_200_000, 50.2),
        "awq-w4a16": full("awq-w4a16", perplexity=26.2, size=87_600_000, speed=57.0),
        "rtn-w8a8": full("rtn-w8a8", "W8A8", 24.1, 163_900_000, 66.0),
        "gptq-w4a16": full(),
        "unet-w4": images(),
        "minimal": MINIMAL,
    }
    for name, content in neighbours.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "aerogel.json").write_text(json.dumps(content))
    return root / "gptq-w4a16"


if __name__ == "__main__":
    folders(Path(sys.argv[1]))
