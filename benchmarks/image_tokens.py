"""Time to the first token of vision-language models with fewer image tokens, against what the operations that are left predict.

    python benchmarks/image_tokens.py            # about ten minutes on two cores -> results/image_tokens.json
    python benchmarks/image_tokens.py --quick    # one shape, one round; nothing is written

Decoders in the shapes of SmolLM2 135M and Llama 3.2 1B with random weights, behind a vision tower of 24 x 24 patches that is small on
purpose: what is measured is the decoder. Only the seconds mean something.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
import transformers
from results import write

from aerogel.engine.opening import open_model
from aerogel.methods.tokens.divprune import Divprune
from aerogel.methods.tokens.fastv import Fastv
from aerogel.methods.tokens.policy import TokenPolicy
from aerogel.methods.tokens.pyramid_drop import PyramidDrop
from aerogel.methods.tower_tokens.fastervlm import Fastervlm
from aerogel.methods.tower_tokens.visionzip import Visionzip
from aerogel.model.calls import Call
from aerogel.model.network import Network

IMAGE, TEXT, IMAGE_TOKEN, THREADS, ROUNDS = 576, 40, 5, 2, 3
SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2 135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "Llama 3.2 1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}  # fmt: skip
RULES: dict[str, Callable[[int], TokenPolicy]] = {
    "divprune": lambda count: Divprune(keep=count),
    "fastervlm": lambda count: Fastervlm(keep=count),
    "visionzip": lambda count: Visionzip(dominant=count - count // 10, contextual=count // 10),
    "fastv, from block 2": lambda count: Fastv(keep=count, layer=2),
    "pyramid_drop, half to it": lambda count: PyramidDrop(keep=(IMAGE // 2 + count // 2, count), at=(0.125, 0.25)),
}
COUNTS = (288, 144, 64)
LARGE_RULES = ("divprune", "fastv, from block 2")
"""Rules that are timed on the larger shape too."""


def model(shape: dict[str, int]) -> Network:
    """A decoder behind a small tower."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14, projection_dim=32
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**shape), image_token_index=IMAGE_TOKEN)
    return open_model(transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False))


def prompt() -> Call:
    """An image, then a question."""
    words = torch.randint(10, 1000, (1, TEXT), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, :1], torch.full((1, IMAGE), IMAGE_TOKEN), words[:, 1:]], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    return Call(
        (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "logits_to_keep": 1, "use_cache": True}
    )


def operations(shape: dict[str, int], lengths: tuple[int, ...]) -> float:
    """Multiplications of a prefill of so many positions in each block; the head reads one."""
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    key_width = width // heads * shape["num_key_value_heads"]
    linear = 2 * width * width + 2 * width * key_width + 3 * width * inner
    return sum(linear * length + width * length**2 for length in lengths) + width * shape["vocab_size"]


def timed(network: Network, call: Call) -> float:
    """Seconds of one forward."""
    start = perf_counter()
    network.run(call)
    return perf_counter() - start


def measured(name: str, rounds: int) -> list[list[Any]]:
    """Rows of the table for one shape: in each round every setting once, beside all tokens and beside texts of the same lengths."""
    shape, call = SHAPES[name], prompt()
    network = model(shape)
    rules = {rule: make for rule, make in RULES.items() if shape["hidden_size"] < 1000 or rule in LARGE_RULES}
    policies = {(rule, count): make(count) for rule, make in rules.items() for count in COUNTS}
    states = {key: policy.fitted(network, [call]) for key, policy in policies.items()}
    texts = {length: text_alone(length) for length in (IMAGE + TEXT, *(count + TEXT for count in COUNTS))}
    seconds: dict[Any, list[float]] = {key: [] for key in [None, *policies, *texts]}
    lengths: dict[Any, tuple[int, ...]] = {None: (IMAGE + TEXT,) * shape["num_hidden_layers"]}
    timed(network, call)
    for _ in range(rounds):
        for length, asked in texts.items():
            seconds[length].append(timed(network, asked))
        for key in [None, *policies]:
            with policies[key].acting(network, states[key]) if key else nullcontext() as shortening:
                seconds[key].append(timed(network, call))
                if shortening is not None:
                    lengths[key] = shortening.lengths
    median = {key: statistics.median(values) for key, values in seconds.items()}
    whole, rows = operations(shape, lengths[None]), []
    for key in [None, *policies]:
        rule, count = key or ("all tokens", IMAGE)
        kept = sum(lengths[key]) / shape["num_hidden_layers"] - TEXT
        shares = median[key] / median[None], operations(shape, lengths[key]) / whole, median[count + TEXT] / median[IMAGE + TEXT]
        rows.append([name, rule, count, round(kept), round(median[key], 3), *(round(share, 3) for share in shares)])
        print(*rows[-1], flush=True)
    return rows


def text_alone(length: int) -> Call:
    """A prompt of text."""
    ids = torch.randint(10, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    return Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1, "use_cache": True})


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(THREADS)
    quick = "--quick" in sys.argv
    rows = [row for name in list(SHAPES)[: 1 if quick else None] for row in measured(name, 1 if quick else ROUNDS)]
    if quick:
        return
    settings = {
        "prompt": f"{IMAGE} tokens of an image and {TEXT} of text", "dtype": "float32", "threads": THREADS, "rounds": ROUNDS, "seed": 0,
    }  # fmt: skip
    columns = [
        "decoder",
        "rule",
        "image tokens",
        "computed, mean over blocks",
        "seconds",
        "of all tokens",
        "operations say",
        "texts as long",
    ]
    notes = [
        "Operations say: multiplications that are left, of those with all tokens.",
        "Texts as long: seconds of a text as long as the prompt with so many image tokens, over one as long as all, without any policy.",
        "The whole forward up to the first token's logits, with the choice of tokens: medians; in each round every setting once.",
        "Weights are random, so which tokens stay means nothing here; of the vision tower only its seconds count.",
    ]
    write("image_tokens", "Time to the first token with fewer image tokens", settings, columns, rows, notes)


if __name__ == "__main__":
    main()
