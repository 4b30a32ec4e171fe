"""Text samples: documents from a shipped set, a file, a folder, the hub or Python, tokenised and cut into sequences.

T tokens of the whole source, N sequences of L tokens.

A source is a stream: every document is tokenised without special tokens, an end-of-sequence token is put behind it when the
tokenizer has one and the document does not end with it, and documents follow each other in the order in which they are stored.
`samples` cuts the stream into consecutive windows that do not overlap and draws from them by seed; measures read the stream
from its start. What is tokenised already is such a stream as it is.
"""

from __future__ import annotations

import hashlib
import warnings
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aerogel.data import sources
from aerogel.data.records import text_of
from aerogel.data.sources import SHIPPED
from aerogel.data.tokenized import Tokenized
from aerogel.errors import AerogelError
from aerogel.model.calls import Call

MOST_CHARACTERS, MOST_STREAMED = 2**30, 2**26
"""Characters that are read of a source at most: of files, and of what is fetched from the hub or given in Python."""


def documents(source: Any, tokenizer: PreTrainedTokenizerBase | None = None, column: str | None = None) -> list[str]:
    """Return the documents of a source; raises AerogelError like `read`."""
    return list(read(source, tokenizer, column))


def read(source: Any, tokenizer: PreTrainedTokenizerBase | None = None, column: str | None = None) -> Iterator[str]:
    """Yield the documents of a source that are not empty: a name, a path, a dataset of the hub, or what is given in Python.

    `sources.records` says what there is, `records.text_of` which columns of a record are read and what `column` does. Where there is
    more text than MOST_CHARACTERS or MOST_STREAMED, reading stops there with a warning. Raises AerogelError when there is no such
    source, a record has no text, or nothing is in it.
    """
    given, most = 0, MOST_STREAMED if sources.is_streamed(source) else MOST_CHARACTERS
    for record in sources.records(source):
        if not (text := text_of(record, tokenizer, column).strip()):
            continue
        if given > most:
            warnings.warn(f"text source {sources.name_of(source)!r} is read up to its first {most:,} characters", stacklevel=2)
            return
        given += len(text)
        yield text
    if not given:
        name, known = sources.name_of(source), ", ".join(SHIPPED)
        raise AerogelError(f"text source {name!r} is empty; give a file with text in it or one of: {known}")


def tokens(tokenizer: PreTrainedTokenizerBase, source: Any, limit: int | None = None, column: str | None = None) -> Tensor:
    """Return a source as one stream tokens_T, int64; with `limit` its first tokens only, and documents behind them are not read."""
    if isinstance(source, Tokenized):
        return torch.cat(source.rows)[:limit]
    eos, stream = tokenizer.eos_token_id, array("q")
    for document in read(source, tokenizer, column):
        stream.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if eos is not None and stream[-1:] != array("q", [eos]):
            stream.append(eos)
        if limit is not None and len(stream) >= limit:
            break
    return torch.tensor(stream[:limit], dtype=torch.int64)


def samples(
    tokenizer: PreTrainedTokenizerBase,
    source: Any = "sotu",
    count: int = 128,
    length: int = 512,
    seed: int = 0,
    column: str | None = None,
) -> Tensor:
    """Return `count` sequences tokens_NL of `length` tokens that do not overlap, drawn by seed.

    A tokenizer that begins every text with a token of its own (Llama, Gemma) gets it at the start of every sequence, inside
    `length`. Raises AerogelError when the source has not enough tokens for one sequence; warns when it has not enough for
    `count` and returns those there are.
    """
    prefix, name = opening(tokenizer), sources.name_of(source)
    body = length - len(prefix)
    if body < 1 or count < 1:
        raise AerogelError(f"cannot draw {count} sequences of {length} tokens; both must be at least 1 (length {len(prefix) + 1} here)")
    stream_T = tokens(tokenizer, source, column=column)
    windows = len(stream_T) // body
    if windows == 0:
        raise AerogelError(
            f"text source {name!r} has {len(stream_T)} tokens, one sequence needs {body}; give more text or a shorter length"
        )
    if windows < count:
        warnings.warn(f"text source {name!r} gives {windows} of the {count} sequences of {length} tokens asked for", stacklevel=2)
    chosen_N = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count]
    windows_NL = stream_T[: windows * body].reshape(windows, body)[chosen_N]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(chosen_N), -1), windows_NL], dim=1)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer itself puts before every text: usually none, or one."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][0]
    return [int(bos)] if bos is not None and first == bos else []


def calls(tokens_NL: Tensor, batch: int = 8) -> list[Call]:
    """Return the forwards that read these sequences, `batch` at a time; nothing is padded, so there is no mask."""
    return [Call((), {"input_ids": rows_BL, "use_cache": False}) for rows_BL in tokens_NL.split(batch)]


def fingerprint(tokens: Tensor) -> str:
    """Return what identifies these tokens in a run's provenance: `sha256:` of their shape and little-endian int64 values."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"
