"""Models, tokenizers and quantized layers that GGUF files hold and llama.cpp runs, as far as it is known before one is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aerogel.io.json_files import read_object
from aerogel.numerics.scheme import PerBlock, PerGroup, Scheme

MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""The model_type of the architectures that are written."""
BLOCK = 32
"""Columns that have a scale in common in every block type that is written."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}


def model_reasons(config: Any) -> Iterator[str]:
    """Yield what llama.cpp cannot run of a model, by its config."""
    if config.model_type not in MODELS:
        yield f"the architecture {config.model_type} is not one of {', '.join(MODELS)}"
        return
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        yield f"its rotary embedding is of the type {rope}, written here is the default one only"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        yield f"it attends to a sliding window of {config.sliding_window}, which llama.cpp does not do for it"
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, llama.cpp computes silu"


def tokenizer_reason(folder: Path, vocabulary: int) -> str | None:
    """Return why the folder's tokenizer cannot be stored in GGUF, or None; `vocabulary` is the number of embeddings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "it has no tokenizer.json, and a GGUF file carries its tokenizer"
    tokenizer = read_object(path)
    try:
        model, ids = tokenizer["model"], [added["id"] for added in tokenizer["added_tokens"]]
        byte_level = model["type"] == "BPE" and not model.get("byte_fallback") and split_of(tokenizer) is not None
        last = max([*model["vocab"].values(), *ids]) if byte_level else -1
    except (KeyError, TypeError, AttributeError, ValueError):
        return "its tokenizer.json is not as the package tokenizers writes it"
    if not byte_level:
        return "its tokenizer is not one of the byte-level BPE kinds gpt-2, smollm, llama-bpe and qwen2"
    return f"its tokenizer has more tokens than the {vocabulary} embeddings" if last >= vocabulary else None


def split_of(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the first split of text, or None when it is none that it has."""
    first = tokenizer.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"]:
            return _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        case _:
            return None


def columns_reason(columns: int) -> str | None:
    """Return why rows of so many columns have no whole blocks, or None."""
    return f"{columns} inputs do not divide into blocks of {BLOCK}" if columns % BLOCK else None


def scheme_reason(scheme: Scheme, act_order: bool) -> str | None:
    """Return why no block type holds the integer codes of a scheme as they are, or None."""
    weights = scheme.weights
    if scheme.inputs is not None:
        return f"{scheme} quantizes inputs, which GGUF leaves to the engine"
    if weights.format.kind == "float":
        return f"{weights.format} weights have no block type here"
    if act_order:
        return "its groups follow activation order, blocks follow column order"
    if isinstance(weights.granularity, PerBlock) or (isinstance(weights.granularity, PerGroup) and weights.granularity.size % BLOCK):
        return f"blocks of {BLOCK} do not tile the scales of {scheme}"
    if not weights.symmetric and scheme.bits > 4:
        return f"{scheme} is asymmetric with more than 4 bits, and only Q4_1 has an offset"
    return None
