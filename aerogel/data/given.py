"""Text and tokens that are given in Python, read once: strings, records, datasets, tensors, tokenised dicts and iterables of these."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from aerogel.data import datasets_library, sources, tokenized
from aerogel.data.text import MOST_STREAMED
from aerogel.data.tokenized import Tokenized
from aerogel.errors import AerogelError


def parse(data: Any, column: str | None = None) -> Any:
    """Return tokens as Tokenized, and text as a source that can be read twice: a name, a dataset, or a sequence of strings or records.

    With a `column` it is text. What can be read only once is read to its end, or to MOST_STREAMED characters with a warning. Raises
    AerogelError for what is neither, and where nothing is in it.
    """
    if sources.is_named(data) or isinstance(data, Tokenized) or sources.is_table(data):
        return data
    if datasets_library.is_dataset(data):
        is_text = column is not None or "input_ids" not in datasets_library.columns_of(data)
        return data if is_text else tokenized.read(row.value for row in datasets_library.rows_of(data, "given dataset"))
    if tokenized.is_batch(data):
        return tokenized.read([data])
    if isinstance(data, Mapping):
        return [data]
    if not isinstance(data, Iterable):
        raise AerogelError(
            f"data is a {type(data).__name__}; expected a source by name, strings, records, a dataset or {tokenized.EXPECTED}"
        )
    items = iter(data)
    if (first := next(items, None)) is None:
        raise AerogelError("the given data is empty; expected strings, records or tokens")
    if column is None and tokenized.is_tokens(first):
        return tokenized.read(chain([first], items))
    return data if isinstance(data, Sequence) else list(_bounded(chain([first], items)))


def _bounded(items: Iterable[Any]) -> Iterator[Any]:
    read = 0
    for item in items:
        if read > MOST_STREAMED:
            warnings.warn(f"given documents are read up to the first {MOST_STREAMED:,} characters", stacklevel=2)
            return
        read += 1 + _characters(item)
        yield item


def _characters(item: Any) -> int:
    if isinstance(item, str):
        return len(item)
    inner = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return sum(map(_characters, inner))
