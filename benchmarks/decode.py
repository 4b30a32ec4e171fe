"""Wall-clock of compressed networks beside float ones and other engines, in turns, on one machine in one run.

    python benchmarks/decode.py build               # torchao and llama-cpp-python (compiles: 10 to 20 minutes), each in a place of its own
    python benchmarks/decode.py shape --layers 16   # a random network of the shape of Llama 3.2 1B -> results/decode.json
    python benchmarks/decode.py text                # SmolLM2-135M in 4 bits, beside llama.cpp and transformers -> results/generation.json

Set GOMP_SPINCOUNT=1000 on a machine that has other work: threads that spin long at barriers slow each other down.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

import torch
from results import write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aerogel.engine.opening import open_model
from aerogel.evaluate.speed import Speed
from aerogel.inference.generate import Generator
from aerogel.io.reference import REFERENCES
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.family import Family
from aerogel.model.network import Network
from aerogel.numerics.quantize import quantize, weight_grid
from aerogel.numerics.scheme import Scheme

ENVIRONMENTS = Path(__file__).resolve().parent.parent / ".envs"
TORCHAO = "torchao==0.18.*"
LLAMA_CPP = "llama-cpp-python==0.3.*"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPT = "The history of the American presidency begins with"


def build() -> None:
    """Install the rivals: torchao beside nothing it could disturb, llama.cpp in an environment of its own."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", ENVIRONMENTS / "torchao", TORCHAO], check=True)
    venv.create(ENVIRONMENTS / "llama-cpp", with_pip=True)
    subprocess.run([ENVIRONMENTS / "llama-cpp" / "bin" / "python", "-m", "pip", "install", LLAMA_CPP], check=True)


def rounded(module: nn.Module, preset: str) -> nn.Module:
    """A twin of `module` that shares its float tensors and has its blocks' linears rounded to the nearest code."""
    scheme = Scheme.parse(preset)
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for name, linear in list(twin.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            grid = stored_grid(weight_grid(linear.weight, scheme.weights), torch.float32)
            quantized = QuantLinear.from_codes(linear, scheme, quantize(linear.weight, grid, scheme.weights), grid)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, quantized)
    return twin


def torchao_twins(module: nn.Module) -> dict[str, nn.Module]:
    """The same network quantized by torchao, eager, where it is installed."""
    sys.path.append(str(ENVIRONMENTS / "torchao"))
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return {}

    def block_linear(part: nn.Module, name: str) -> bool:
        return isinstance(part, nn.Linear) and "lm_head" not in name

    twins = {}
    for label, config, dtype in (
        ("torchao W4A16", PrototypeInt4WeightOnlyConfig(group_size=128), torch.bfloat16),  # its packed kernel takes bfloat16 only
        ("torchao W8A8", Int8DynamicActivationInt8WeightConfig(), torch.float32),
    ):
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
        twins[label] = twin if dtype == torch.float32 else copy.deepcopy(module).to(dtype)
        quantize_(twins[label], config, filter_fn=block_linear)
    return twins


def shape(options: argparse.Namespace) -> None:
    """Prefill and decode of a random network of Llama 3.2 1B's shape; the vocabulary shrinks with the layers, which keeps shares."""
    config = LlamaConfig(
        vocab_size=8016 * options.layers, hidden_size=2048, intermediate_size=8192, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    modules: dict[str, nn.Module] = {"float32": base}
    modules |= {name: copy.deepcopy(base).to(dtype) for name, dtype in FLOATS.items() if name != "float32"}
    modules |= {"W4A16 (groups of 128)": rounded(base, "W4A16"), "W8A8": rounded(base, "W8A8")} | torchao_twins(base)
    networks = {name: Network(module, Family("llama", ("llama",))) for name, module in modules.items()}
    options = Speed(prompt=options.prompt, new_tokens=options.new_tokens, rounds=options.rounds, threads=options.threads)
    found = options.compare(networks)
    fastest = {kind: max(found[name][f"{kind}_tokens_per_second"] for name in FLOATS) for kind in ("prefill", "decode")}
    rows = []
    for name, facts in found.items():
        speeds = [facts[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode")]
        over = [speed / fastest[kind] for speed, kind in zip(speeds, ("prefill", "decode"), strict=True)]
        memory = None if name.startswith("torchao") else facts["peak_memory_bytes"] / 2**20  # its tensors do not tell their true size
        rows.append([name, *speeds, *over, memory, facts["path"]])
    settings = {
        "layers": options.layers, "width": 2048, "MLP": 8192, "heads": "32/8", "vocabulary": config.vocab_size, "batch": 1,
        "prompt": options.prompt, "new tokens": options.new_tokens, "rounds": options.rounds, "threads": torch_threads(options),
    }  # fmt: skip
    columns = ["model", "prefill tok/s", "decode tok/s", "prefill over fastest float", "decode over fastest float", "peak MiB", "path"]
    notes = [
        "Random weights of the shape of Llama 3.2 1B. All models alternate in one process and use the same generation code.",
        "Float embeddings and heads in all rows. torchao runs eagerly; its 4-bit kernel supports bfloat16 models only.",
    ]
    print(write("decode", "Llama-1B shape: prefill and decode", settings, columns, rows, notes).read_text())


class LlamaCpp:
    """The other process."""

    def __init__(self, threads: int, length: int) -> None:
        packaged = REFERENCES["smollm2-135m"]
        file = next(Path(folder) / packaged.file for folder in sys.path if (Path(folder) / packaged.file).exists())
        script = Path(__file__).with_name("rivals") / "llama_cpp_decode.py"
        command = [ENVIRONMENTS / "llama-cpp" / "bin" / "python", script, file, str(threads), str(length)]
        own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=own)

    def turn(self, prompt: list[int], new: int) -> float:
        """Milliseconds a token, the median of one turn."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
        return 1000 * statistics.median(json.loads(self.process.stdout.readline())["step_seconds"])


def text(options: argparse.Namespace) -> None:
    """Greedy tokens of SmolLM2-135M: 4 bits by the fast decoder, through transformers' own generate, and llama.cpp on its own file."""
    torch.set_num_threads(torch_threads(options))
    original = open_model("smollm2-135m", lazy=False, dtype=torch.float32)
    original.module.generation_config.eos_token_id = None  # all write the same number of tokens
    small = Network(rounded(original.module, "W4A16_G64"), original.family, processor=original.processor)
    tokens_BT = torch.tensor([original.processor(PROMPT).input_ids])
    length = tokens_BT.shape[1] + options.new_tokens
    rivals: dict[str, Callable[[], float]] = {}
    if (ENVIRONMENTS / "llama-cpp").exists():
        llama = LlamaCpp(torch_threads(options), length)
        rivals["llama.cpp, Q4_1 (8-bit head)"] = lambda: llama.turn(tokens_BT[0].tolist(), options.new_tokens)
    made: dict[str, Tensor] = {}
    for label, network in (("W4A16 (groups of 64)", small), ("float32", original)):
        rivals[f"aerogel fast decoder, {label}"] = _fast(label, network, tokens_BT, options.new_tokens, made)
        rivals[f"transformers generate, {label}"] = _own(label, network, tokens_BT, options.new_tokens, made)
    for turn in rivals.values():
        turn()
    turns: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(options.rounds):
        for name, turn in rivals.items():
            turns[name].append(turn())
    first = next(iter(turns.values()))
    rows = [
        [
            name,
            1000 / statistics.median(taken),
            statistics.median(taken),
            statistics.median(a / b for a, b in zip(first, taken, strict=True)),
        ]
        for name, taken in turns.items()
    ]
    same = {label: torch.equal(made[f"fast {label}"], made[f"own {label}"]) for label in ("W4A16 (groups of 64)", "float32")}
    settings = {
        "model": "SmolLM2-135M-Instruct", "batch": 1, "prompt": tokens_BT.shape[1], "new tokens": options.new_tokens,
        "rounds": options.rounds, "threads": torch_threads(options),
    }  # fmt: skip
    notes = [
        "Engines alternate. Milliseconds are medians over rounds of the median token of each round; ratios are taken within a round.",
        f"Greedy tokens of the fast decoder equal those of transformers generate: {', '.join(f'{k}: {v}' for k, v in same.items())}.",
    ]
    columns = ["engine", "tok/s", "ms per token", f"speed over {next(iter(turns)).split(',')[0]}"]
    print(write("generation", "SmolLM2-135M, greedy decoding at batch 1", settings, columns, rows, notes).read_text())


def _fast(label: str, network: Network, tokens_BT: Tensor, new: int, made: dict[str, Tensor]) -> Callable[[], float]:
    generator = Generator(network, 1, tokens_BT.shape[1] + new)

    def turn() -> float:
        generation = generator.generate(tokens_BT, new)
        assert generation.path == "fast_decoder", generation.reason
        made[f"fast {label}"] = generation.tokens
        return 1000 * statistics.median(generation.step_seconds)

    return turn


def _own(label: str, network: Network, tokens_BT: Tensor, new: int, made: dict[str, Tensor]) -> Callable[[], float]:
    def turn() -> float:
        """Whole calls, which contain the prefill of a few tokens: generate gives no times of its own."""
        start = time.perf_counter()
        with torch.no_grad():
            tokens = network.module.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        made[f"own {label}"] = tokens[:, tokens_BT.shape[1] :]
        return 1000 * (time.perf_counter() - start) / new

    return turn


def torch_threads(options: argparse.Namespace) -> int:
    """Threads asked for, or all that torch takes by itself."""
    return options.threads or torch.get_num_threads()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "shape", "text"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    {"build": lambda _: build(), "shape": shape, "text": text}[options.what](options)


if __name__ == "__main__":
    main()
