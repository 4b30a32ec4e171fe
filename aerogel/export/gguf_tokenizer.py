"""A tokenizer.json as GGUF says it: tokens, kinds, merges, and the name llama.cpp has for the way text is split first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import tokenizers

from aerogel.io.gguf_contract import split_of
from aerogel.io.json_files import read_object


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write the tokenizer's keys; embeddings that no token uses get an unused one."""
    path = folder / "tokenizer.json"
    tokenizer = read_object(path)
    tokens = _tokens(tokenizer)
    unused = (gguf.TokenType.UNUSED, "[PAD{}]")
    listed = [tokens.get(number, (unused[0], unused[1].format(number))) for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_of(tokenizer) or "default")
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
