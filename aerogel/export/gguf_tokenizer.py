"""A tokenizer.json as GGUF says it: tokens, kinds, merges, and the name llama.cpp has for the way text is split first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import tokenizers

from aerogel.io.json_files import read_object

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}


def tokenizer_reason(folder: Path, vocabulary: int) -> str | None:
    """Return why the folder's tokenizer cannot be stored in GGUF, or None; `vocabulary` is the number of embeddings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "it has no tokenizer.json, and a GGUF file carries its tokenizer"
    tokenizer = read_object(path)
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback") or _split(tokenizer) is None:
        return "its tokenizer is not one of the byte-level BPE kinds gpt-2, smollm, llama-bpe and qwen2"
    if max(_tokens(tokenizer)) >= vocabulary:
        return f"its tokenizer has more tokens than the {vocabulary} embeddings"
    return None


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write the tokenizer's keys; embeddings that no token uses get an unused one."""
    path = folder / "tokenizer.json"
    tokenizer = read_object(path)
    tokens = _tokens(tokenizer)
    unused = (gguf.TokenType.UNUSED, "[PAD{}]")
    listed = [tokens.get(number, (unused[0], unused[1].format(number))) for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(tokenizer) or "default")
    writer.add_token_list([text for _, text in listed])
    writer.add_token_types([kind for kind, _ in listed])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    first = tokenizers.Tokenizer.from_file(str(path)).encode("a").ids[:1]
    special.add_special_token["bos"] = first == [special.special_token_ids.get("bos")]
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: dict[str, Any]) -> dict[int, tuple[gguf.TokenType, str]]:
    tokens = {number: (gguf.TokenType.NORMAL, text) for text, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (kind, added["content"])
    return tokens


def _split(tokenizer: dict[str, Any]) -> str | None:
    """The name of the first split of text, or None when it is none that llama.cpp has."""
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
