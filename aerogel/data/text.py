"""Text samples: documents from a shipped set, a file or a folder, tokenised and cut into sequences.

T tokens of the whole source, N sequences of L tokens.

A source is a stream: every document is tokenised without special tokens, an end-of-sequence token is put behind it when the
tokenizer has one and the document does not end with it, and documents follow each other in the order in which they are stored.
`samples` cuts the stream into consecutive windows that do not overlap and draws from them by seed; measures read the stream
from its start.
"""

from __future__ import annotations

import gzip
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aerogel.errors import AerogelError
from aerogel.io.json_files import parse_json
from aerogel.model.calls import Call

SHIPPED = tuple(sorted(path.name.removesuffix(".txt.gz") for path in Path(__file__).parent.glob("*.txt.gz")))
"""Names of the text that comes with the package; SOURCES.md says what each one is."""


def documents(source: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Return the documents of a source: a shipped name, a .txt (form feeds separate documents), a .jsonl or a `datasets` folder.

    A record holds its text in the field `text`, or a chat in the field `messages`, which goes through the tokenizer's chat
    template. Raises AerogelError when there is no such source, a record has neither field, or nothing is in it.
    """
    found = [text for text in (text.strip() for text in _read(source, tokenizer)) if text]
    if not found:
        raise AerogelError(f"text source {str(source)!r} is empty; give a file with text in it or one of: {', '.join(SHIPPED)}")
    return found


def tokens(tokenizer: PreTrainedTokenizerBase, source: str | Path, limit: int | None = None) -> Tensor:
    """Return a source as one stream tokens_T, int64; with `limit` its first tokens only, and documents behind them are not tokenised."""
    eos, stream = tokenizer.eos_token_id, list[int]()
    for document in documents(source, tokenizer):
        if limit is not None and len(stream) >= limit:
            break
        stream.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if eos is not None and stream[-1:] != [eos]:
            stream.append(eos)
    return torch.tensor(stream[:limit], dtype=torch.int64)


def samples(tokenizer: PreTrainedTokenizerBase, source: str | Path = "sotu", count: int = 128, length: int = 512, seed: int = 0) -> Tensor:
    """Return `count` sequences tokens_NL of `length` tokens that do not overlap, drawn by seed.

    A tokenizer that begins every text with a token of its own (Llama, Gemma) gets it at the start of every sequence, inside
    `length`. Raises AerogelError when the source has not enough tokens for one sequence; warns when it has not enough for
    `count` and returns those there are.
    """
    prefix = opening(tokenizer)
    body = length - len(prefix)
    if body < 1 or count < 1:
        raise AerogelError(f"cannot draw {count} sequences of {length} tokens; both must be at least 1 (length {len(prefix) + 1} here)")
    stream_T = tokens(tokenizer, source)
    windows = len(stream_T) // body
    if windows == 0:
        raise AerogelError(
            f"text source {str(source)!r} has {len(stream_T)} tokens, one sequence needs {body}; give more text or a shorter length"
        )
    if windows < count:
        warnings.warn(f"text source {str(source)!r} gives {windows} of the {count} sequences of {length} tokens asked for", stacklevel=2)
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


def _read(source: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterable[str]:
    if str(source) in SHIPPED:
        return gzip.decompress((Path(__file__).parent / f"{source}.txt.gz").read_bytes()).decode().split("\f")
    path = Path(source)
    if path.is_dir():
        return _dataset(path, tokenizer)
    if not path.is_file():
        known = ", ".join(SHIPPED)
        raise AerogelError(f"no text source {str(source)!r}; give a .txt, a .jsonl, a folder saved by datasets, or one of: {known}")
    if path.suffix == ".jsonl":
        return _lines(path, tokenizer)
    try:
        return path.read_text("utf-8").split("\f")
    except UnicodeDecodeError as error:
        raise AerogelError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or give a .jsonl or a datasets folder") from error


def _lines(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = parse_json(line, f"{path} line {number}", "one JSON object a line is expected")
                yield _text(record, tokenizer, f"{path} line {number}")


def _dataset(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise AerogelError(f"reading the dataset folder {path} needs the datasets package: pip install 'aerogel[datasets]'") from error
    try:
        rows = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise AerogelError(f"{path} is not a folder saved by datasets (save_to_disk); give one, or a .txt or .jsonl file") from error
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            folders = ", ".join(str(path / name) for name in rows)
            raise AerogelError(f"{path} has no split called train; give the folder of one split: {folders}")
        rows = rows["train"]
    for number, record in enumerate(rows):
        yield _text(record, tokenizer, f"{path} row {number}")


def _text(record: Any, tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if tokenizer is None or not tokenizer.chat_template:
            raise AerogelError(f"{place} is a chat, and this tokenizer has no chat template; give records with a text field")
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    raise AerogelError(f"{place} has neither a text nor a messages field")
