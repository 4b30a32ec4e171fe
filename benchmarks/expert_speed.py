"""What skipped experts save of wall-clock at the layer shape of Qwen3-30B-A3B; writes benchmarks/results/expert_speed.json.

python benchmarks/expert_speed.py                    # CPU, 8 layers in bfloat16: 11 GB
python benchmarks/expert_speed.py --device cuda --layers 24
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import accelerate
import torch
from results import write
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from aerogel.engine.opening import open_model
from aerogel.methods.experts.modes import Modes, ModesState
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping import backend
from aerogel.runtime.expert_skipping.counting import Tally, counting
from aerogel.runtime.expert_skipping.frontier import Evaluations, Value, crossing
from aerogel.runtime.token_types import Vocabulary

HIDDEN, EXPERTS, TOP, PROMPT = 2048, 128, 8, 512
STOCK = ("grouped_mm", "eager", "batched_mm")
COLUMNS = ["phase", "variant", "assignments skipped", "milliseconds", "speed-up over the fastest stock", "ideal", "share of ideal"]
NOTES = [
    "One process, variants alternate, medians; prefill of 512 tokens, then decoding of one token, batch 1.",
    (
        "Random weights. Router logits are the sum of a part common to all tokens (some experts are popular) and a "
        "part per token, with a standard deviation of about 1.5."
    ),
    "Ideal: multiply-accumulates of all linear layers and attention without skipping, divided by the remaining ones.",
    "Importance decreases by a third from layer to layer, or is the same in all layers. Thresholds meet the ratio on this prompt.",
    "batched_mm copies the expert weights for each assignment, 26 GB for this prompt: it is timed in decoding only.",
    "Target: 2.2 times in prefill at 88 %, 1.3 in decoding, 0.8 of the ideal.",
]


def build(layers: int, dtype: torch.dtype, device: str) -> Qwen3MoeForCausalLM:
    """The network with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=EXPERTS, num_experts_per_tok=TOP, norm_topk_prob=True,
        decoder_sparse_step=1, max_position_embeddings=4096,
    )  # fmt: skip
    with accelerate.init_empty_weights(include_buffers=False):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=dtype)
    torch.manual_seed(0)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_filled(key, parameter, dtype, device), requires_grad=False)
    common = torch.randn(HIDDEN, dtype=torch.float32, device=device)
    common /= common.norm()
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, device=device) + 0.5 * HIDDEN**0.5 * common)
    for layer in model.model.layers:
        own = torch.randn(EXPERTS, HIDDEN, device=device) * 1.5 / HIDDEN**0.5
        popular = torch.randn(EXPERTS, 1, device=device) * 1.5 / HIDDEN**0.5
        layer.mlp.gate.weight.copy_(own + popular * common)
    return model.to(device).eval()


def _filled(key: str, parameter: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    if parameter.ndim == 1:
        return torch.ones(parameter.shape, dtype=dtype, device=device)
    return torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.3 / parameter.shape[-1] ** 0.5)


def importance(layers: int, falling: bool) -> Tensor:
    """Importance of each layer for text; vision does not occur."""
    text = torch.tensor([(2 / 3) ** layer if falling else 1.0 for layer in range(layers)])
    return torch.stack([text / text.sum(), torch.full((layers,), 1 / layers)], dim=1)


def state(network: Network, ratio: float, falling: bool, call: Call, layers: int) -> ModesState:
    """A MoDES policy that skips so much of this prompt."""
    thresholds = torch.logspace(-5, 0, 200).tolist()

    def made(number: int) -> ModesState:
        both = torch.tensor([thresholds[number]] * 2)
        model: dict[str, Any] = {"layers": layers, "experts": EXPERTS, "top_k": TOP, "vision": (), "special": ()}
        return ModesState(**model, power=1.0, importance=importance(layers, falling), thresholds=both)

    def evaluate(cell: tuple[int, int]) -> Value:
        with Modes().on(network, made(cell[0])), counting(network, Vocabulary((), ())) as tally:
            network.run(call)
        return Value(0.0, tally.ratio())

    found = crossing(Evaluations(evaluate), len(thresholds), ratio)
    assert found is not None
    return made(found.cell[0])


class Prefill:
    """The whole prompt at once."""

    tokens, seen, forwards = PROMPT, PROMPT // 2, 1

    def __init__(self, network: Network, ids: Tensor) -> None:
        self.network, self.call = network, Call((), {"input_ids": ids, "logits_to_keep": 1, "use_cache": False})

    def turn(self, on: Callable[[], AbstractContextManager[Any]], implementation: str) -> None:
        """One forward under a policy."""
        module: Any = self.network.module
        module.set_experts_implementation(implementation)
        with on():
            self.network.run(self.call)


class Decode:
    """One token behind the prompt; several, so that a turn does not hang on one token's experts."""

    tokens, seen, forwards = 1, PROMPT, 8

    def __init__(self, network: Network, ids: Tensor) -> None:
        self.network, self.cache = network, DynamicCache(config=network.config)
        self.next = ids[:, : self.forwards].split(1, dim=1)
        module: Any = network.module
        module.set_experts_implementation("grouped_mm")
        network.run(Call((), {"input_ids": ids, "past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}))

    def turn(self, on: Callable[[], AbstractContextManager[Any]], implementation: str) -> None:
        """Some forwards under a policy, each behind the prompt."""
        module: Any = self.network.module
        module.set_experts_implementation(implementation)
        with on():
            for ids in self.next:
                self.network.run(Call((), {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}))
                self.cache.crop(-1)


def macs(kept: float, tokens: int, seen: int) -> float:
    """Multiply-accumulates a layer: attention's linears and products, and what is left of the experts."""
    attention = HIDDEN * 128 * (32 + 2 * 4 + 32) + 2 * 32 * 128 * seen
    return tokens * (attention + HIDDEN * EXPERTS + kept * TOP * 3 * HIDDEN * 768)


def realised(network: Network, running: Prefill | Decode, on: Callable[[], AbstractContextManager[Any]], implementation: str) -> float:
    """Share of pairs that a turn drops."""
    with ExitStack() as stack:

        def counted() -> AbstractContextManager[Any]:
            stack.enter_context(on())
            tallies.append(stack.enter_context(counting(network, Vocabulary((), ()))))
            return nullcontext()

        tallies: list[Tally] = []
        running.turn(counted, implementation)
    return tallies[0].ratio()


def timed(turns: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, turn by turn, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, run in turns.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append(time.perf_counter() - start)
    return taken


@torch.no_grad()
def main() -> None:
    """Build, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.88])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = build(given.layers, getattr(torch, given.dtype), given.device)
    network = open_model(model, unfuse_experts=False)
    ids = torch.randint(0, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(given.device)
    phases = {"prefill": Prefill(network, ids), "decode": Decode(network, ids)}
    variants: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {name: (nullcontext, name) for name in STOCK}
    variants["aerogel, nothing skipped"] = (nullcontext, backend.NAME)
    for ratio in given.ratios:
        for falling in (True, False):
            on = partial(Modes().on, network, state(network, ratio, falling, phases["prefill"].call, given.layers))
            variants[f"MoDES {ratio:.0%}, {'decreasing' if falling else 'uniform'} importance"] = (on, backend.NAME)
    rows = []
    for phase, running in phases.items():
        turns = {name: partial(running.turn, *variant) for name, variant in variants.items() if phase == "decode" or name != "batched_mm"}
        taken = timed(turns, given.rounds, given.device)
        fastest = min(set(STOCK) & set(taken), key=lambda name: statistics.median(taken[name]))
        for name, seconds in taken.items():
            skipped = realised(network, running, *variants[name])
            times = statistics.median(a / b for a, b in zip(taken[fastest], seconds, strict=True))
            ideal = macs(1, running.tokens, running.seen) / macs(1 - skipped, running.tokens, running.seen)
            rows.append([phase, name, skipped, 1000 * statistics.median(seconds) / running.forwards, times, ideal, times / ideal])
            print(rows[-1], flush=True)
    settings = {
        "layers": given.layers, "shape": f"{EXPERTS} experts, top-{TOP}, hidden {HIDDEN}, expert 768", "dtype": given.dtype,
        "device": given.device, "threads": given.threads, "rounds": given.rounds, "seed": 0,
    }  # fmt: skip
    write("expert_speed", "Expert skipping: wall-clock time", settings, COLUMNS, rows, NOTES)


if __name__ == "__main__":
    main()
