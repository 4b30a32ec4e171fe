"""Runs an architecture through compression, and opens the folder with transformers or diffusers and with aerogel.

`python -m tests.architectures.through rtn [CASE ...]` prints one line for each case: how far it came, and why not further. The recipe is
one of RECIPES, or any other by its name or path.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aerogel
from aerogel.layers.linear import cache_dequantized
from aerogel.layers.replacement import Replacement
from aerogel.model.calls import Call
from aerogel.model.network import Network
from tests.architectures.cases import Case, cases, output, reason
from tests.registration import registered

STAGES = ("build", "compress", "load", "register", "open", "same")
"""What is done with a case, in order: it is built, compressed, loaded by aerogel, opened by its library with our layers and then without
them, and all answers are the same."""
RECIPES: dict[str, dict[str, Any]] = {
    method: {"name": f"{method}-groups-of-32", "steps": [{method: {"scheme": "W4A16_G32"}}]} for method in ("rtn", "gptq", "awq")
}
"""Four bits in groups of 32, which divide the tiny widths. Symmetric: transformers 5.23 puts experts together without zero points."""
TOLERANCE = 1e-5
"""Largest difference of two answers, relative to the largest of the model in memory, that counts as the same."""
OPENERS = {
    "causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "image-text": "AutoModelForImageTextToText",
    "audio-text": "AutoModelForSeq2SeqLM",
}  # fmt: skip
OWN_CLASS = ("emu3", "evolla", "mllama", "musicgen", "musicgen_melody")
"""Types whose saved configuration transformers' auto class does not know: they open through their own class."""


@dataclass(frozen=True)
class Row:
    """Tells how far a case came."""

    kind: str
    name: str
    stage: str = "build"
    """The stage that failed, or `same` when none did."""
    reason: str = ""
    """The error of the stage on one line."""
    share: float = 0.0
    """Part of the weights that multiply, embeddings aside, that is quantized."""
    left: str = ""
    """Names of the largest of the other weights, `*` for numbers."""
    change: float = 0.0
    """Largest relative change of an answer by compression."""
    registered: float = 0.0
    """Largest relative difference of the answers of transformers or diffusers, with our layers, to those of the model in memory."""
    library: float = 0.0
    """The same of transformers by itself; diffusers by itself opens none."""
    loaded: float = 0.0
    """Largest relative difference of the answers after `aerogel.load`."""


def through(case: Case, recipe: str | Mapping[str, Any]) -> Row:
    """Compress a case by a recipe, open what was saved, and compare answers; an error ends the row and is its reason."""
    row = Row(case.kind, case.name)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            for row in _stages(case, recipe, Path(folder) / "out"):  # noqa: B007 - the last one counts
                pass
        except Exception as error:  # noqa: BLE001 - the libraries raise anything; the next case goes on
            return replace(row, reason=reason(error))
    return row


def rows(chosen: Iterable[Case], recipe: str | Mapping[str, Any]) -> Iterator[Row]:
    """Run cases one after another."""
    return (through(case, recipe) for case in chosen)


def _stages(case: Case, recipe: str | Mapping[str, Any], folder: Path) -> Iterator[Row]:
    """Yield the row before each stage, so that the last one names the stage that failed."""
    row = Row(case.kind, case.name)
    module = case.make()
    calls = case.calls(module)
    before = [output(module, call) for call in calls]
    yield (row := replace(row, stage="compress"))
    result = aerogel.compress(module, recipe, samples=calls, output=folder, measures=())
    compressed = result.network.module
    expected = _answers(compressed, calls)
    share, left = _coverage(result.network)
    row = replace(row, share=share, left=left, change=difference(expected, before))
    yield (row := replace(row, stage="load"))
    row = replace(row, loaded=difference(_answers(aerogel.load(folder, lazy=False).module, calls), expected))
    if row.loaded > TOLERANCE:
        raise ValueError("the answers differ")
    yield (row := replace(row, stage="register"))
    with registered():
        row = replace(row, registered=difference(_answers(open_with_library(case, folder), calls), expected))
    if row.registered > TOLERANCE:
        raise ValueError("the answers differ")
    yield (row := replace(row, stage="open"))
    if case.kind != "denoiser":
        row = replace(row, library=difference(_answers(open_with_library(case, folder), calls), expected))
    if row.library > TOLERANCE:
        raise ValueError("the answers differ")
    yield replace(row, stage="same")


def open_with_library(case: Case, folder: Path) -> nn.Module:
    """Open a folder as a user of transformers or diffusers does; raises ValueError for tensors that are missing or left over."""
    if case.kind == "denoiser":
        import diffusers

        return getattr(diffusers, case.name.partition("-")[0]).from_pretrained(folder).eval()
    import transformers

    opener: Any = getattr(transformers, OPENERS[case.kind])
    if case.name in OWN_CLASS:
        opener = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    module, loading = opener.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {key: sorted(map(str, names))[:3] for key, names in loading.items() if names}:
        raise ValueError(f"transformers reports {wrong}")
    return module.eval()


def _answers(module: nn.Module, calls: list[Call]) -> list[Tensor]:
    """Return answers by the float weights of quantized layers, without a kernel's own rounding."""
    with cache_dequantized(module):
        return [output(module, call) for call in calls]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest expected value; values that mask tokens out are left aside."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        seen = other.abs() < torch.finfo(other.dtype).max / 2
        worst = max(worst, float((one - other)[seen].abs().max() / other[seen].abs().max()))
    return worst


def _coverage(network: Network) -> tuple[float, str]:
    """Return the part of the weights in blocks that quantized layers hold, and the names of the largest others.

    Embeddings, head and projectors are left as they are by default. Convolutions that work on each channel by itself multiply no matrix.
    """
    module, blocks = network.module, tuple(f"{name}." for name in network.blocks())
    replaced = {name: part for name, part in module.named_modules() if isinstance(part, Replacement)}
    quantized = sum(_size(part) for name, part in replaced.items() if name.startswith(blocks) or not blocks)
    others: dict[str, int] = {}
    for name, part in module.named_modules():
        if blocks and not name.startswith(blocks):
            continue
        if not isinstance(part, nn.Embedding | nn.Conv1d) and not any(name == each or name.startswith(f"{each}.") for each in replaced):
            for key, weight in part.named_parameters(name, recurse=False):
                if weight.ndim >= 2:
                    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
                    others[pattern] = others.get(pattern, 0) + weight.numel()
    largest = sorted(others, key=lambda pattern: -others[pattern])[:8]
    return quantized / max(quantized + sum(others.values()), 1), ", ".join(largest)


def _size(part: Any) -> int:
    """Return the number of weights of a layer that was a linear layer or a convolution."""
    if hasattr(part, "in_features"):
        return part.in_features * part.out_features
    return sum(tensor.numel() for tensor in part.state_dict().values() if tensor.ndim >= 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the libraries say about small configurations."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def main(recipe: str, *names: str) -> None:
    """Print one line of tab-separated values for each case, and at the end how many came how far."""
    counts: dict[tuple[str, str], int] = {}
    sys.stdout.write("\t".join(field.name for field in fields(Row)) + "\n")
    for row in rows([case for case in cases() if not names or str(case) in names], RECIPES.get(recipe, recipe)):
        counts[row.kind, row.stage] = counts.get((row.kind, row.stage), 0) + 1
        sys.stdout.write("\t".join(_cell(getattr(row, field.name)) for field in fields(Row)) + "\n")
        sys.stdout.flush()
    for (kind, stage), count in sorted(counts.items()):
        sys.stdout.write(f"# {kind}: {count} {stage}\n")


def _cell(value: str | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main(*sys.argv[1:])
