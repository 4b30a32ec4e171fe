"""Tokens given in Python: tensors, tokenised dicts, datasets and DataLoaders of them, as rows of token ids without padding.

N rows, L positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.model.calls import Call

TOKENS_OF_A_CALL = 4096
"""Tokens of one call at most, where it has more than one row."""
MOST_TOKENS = 2**26
"""Tokens that are read at most."""
_UNREAD = frozenset(
    {"labels", "label", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "num_items_in_batch"}
)
"""Columns that tokenizers and collators put beside tokens; a forward for calibration does not read them."""
EXPECTED = "tensors (N, L) of token ids, or dicts with input_ids and, where rows are padded, attention_mask"


@dataclass(frozen=True)
class Tokenized:
    """Sequences of tokens that a language model is calibrated or evaluated on. Rows differ in length; padding is left out."""

    rows: tuple[Tensor, ...]
    """Token ids of each sequence, int64."""
    batch_size: int | None = None
    """Rows in one call; None: as many as have TOKENS_OF_A_CALL tokens. Rows of one call are equally long."""

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.rows))

    def check(self, vocabulary: int | None, positions: int | None) -> None:
        """Raise AerogelError for a token id or a length that a model has not; None where it has no bound."""
        largest = max(int(row_L.max()) for row_L in self.rows)
        if vocabulary is not None and largest >= vocabulary:
            raise AerogelError(
                f"the given tokens have the id {largest}, and the model's vocabulary has {vocabulary}; use its own tokenizer"
            )
        if positions is not None and self.longest > positions:
            raise AerogelError(f"a row of the given tokens has {self.longest} tokens, and the model {positions} positions; cut it")

    def in_calls(self, count: int) -> Tokenized:
        """The same with as few rows in a call as it takes for so many calls."""
        fewer = max(1, self.count // count)
        return replace(self, batch_size=min(self.batch_size or max(1, TOKENS_OF_A_CALL // self.longest), fewer))

    def batches(self) -> list[Tensor]:
        """Rows of one length together, tokens_NL; the lengths in the order in which they first come."""
        by_length: dict[int, list[Tensor]] = {}
        for row_L in self.rows:
            by_length.setdefault(len(row_L), []).append(row_L)
        return [
            batch_NL
            for length, rows in by_length.items()
            for batch_NL in torch.stack(rows).split(self.batch_size or max(1, TOKENS_OF_A_CALL // length))
        ]

    def calls(self) -> list[Call]:
        """The forwards that read the rows; nothing is padded, so there is no mask."""
        return [Call((), {"input_ids": batch_NL, "use_cache": False}) for batch_NL in self.batches()]


def read(batches: Iterable[Any]) -> Tokenized:
    """Return the rows of batches: tensors, lists of ids, or dicts of them, one row or several each; up to MOST_TOKENS, with a warning.

    Raises AerogelError, with the number of the batch, for ids that are no whole numbers, rows of other shapes, an attention mask with
    holes, and other inputs of a model beside the tokens.
    """
    rows = tuple(_bounded(row_L for number, batch in enumerate(batches) for row_L in _rows(batch, number)))
    if not rows:
        raise AerogelError("the given tokens have no row that is not empty or all padding; give rows of token ids")
    return Tokenized(rows)


def is_batch(value: Any) -> bool:
    """Return True for rows of tokens in one object: an array, or a dict with input_ids."""
    return _is_array(value) or (isinstance(value, Mapping) and "input_ids" in value)


def is_tokens(value: Any) -> bool:
    """Return True for one row or batch of tokens."""
    if isinstance(value, list | tuple) and value:
        return _is_array(value[0]) or isinstance(value[0], int) or (isinstance(value[0], list) and is_tokens(value[0]))
    return is_batch(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _bounded(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    read = 0
    for row_L in rows:
        if read > MOST_TOKENS:
            warnings.warn(f"given tokens are read up to the first {MOST_TOKENS:,}", stacklevel=2)
            return
        read += len(row_L)
        yield row_L


def _rows(batch: Any, number: int) -> Iterator[Tensor]:
    """The rows of a batch without their padding; rows of nothing else are left out."""
    place = f"batch {number} of the given tokens"
    mask = None
    if isinstance(batch, Mapping):
        _refuse_others(batch, place)
        mask = batch.get("attention_mask")
        batch = batch.get("input_ids")
    elif isinstance(batch, list | tuple) and _is_array(batch[0]):
        if len(batch) > 1:
            raise AerogelError(f"{place} has {len(batch)} tensors without names; give dicts with input_ids and attention_mask")
        batch = batch[0]
    ids_NL = _two_dimensional(batch, place, "token ids")
    alive_NL = [None] * len(ids_NL) if mask is None else _two_dimensional(mask, place, "attention_mask")
    if len(alive_NL) != len(ids_NL):
        raise AerogelError(f"{place} has {len(ids_NL)} rows of token ids and {len(alive_NL)} of attention_mask")
    for row_L, alive_L in zip(ids_NL, alive_NL, strict=True):
        if len(row_L := _unpadded(row_L, alive_L, place)):
            yield row_L


def _refuse_others(batch: Mapping[str, Any], place: str) -> None:
    """Raise AerogelError for tensors beside the tokens that a model would read."""
    for name, value in batch.items():
        if name in ("input_ids", "attention_mask") or name in _UNREAD or not is_tokens(value):
            continue
        if name == "token_type_ids" and not torch.as_tensor(value).any():
            continue
        raise AerogelError(f"{place} has {name} beside input_ids; remove it, or give recorded calls (aerogel.model.calls.Call)")


def _two_dimensional(value: Any, place: str, what: str) -> list[Tensor]:
    """Rows of whole numbers, int64; a single row counts as one."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | Tensor | np.ndarray):
        return [row for part in value for row in _two_dimensional(part, place, what)]
    try:
        found = torch.tensor(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AerogelError(f"{place} has {what} that are no numbers ({' '.join(str(error).split())[:80]}); expected {EXPECTED}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or (found.dtype == torch.bool and what == "token ids")):
        raise AerogelError(f"{place} has {what} of {str(found.dtype).removeprefix('torch.')}; expected {EXPECTED}")
    if found.ndim not in (1, 2):
        raise AerogelError(f"{place} has {what} of shape {tuple(found.shape)}; expected {EXPECTED}")
    found = found.detach().to("cpu", torch.int64)
    return list(found if found.ndim == 2 else found[None])


def _unpadded(row_L: Tensor, alive_L: Tensor | None, place: str) -> Tensor:
    if len(row_L) and int(row_L.min()) < 0:
        raise AerogelError(f"{place} has the token id {int(row_L.min())}; ids are at least 0")
    if alive_L is None:
        return row_L
    if len(alive_L) != len(row_L):
        raise AerogelError(f"{place} has a row of {len(row_L)} token ids with an attention_mask of {len(alive_L)}")
    seen = alive_L.nonzero()[:, 0]
    if len(seen) and len(seen) != int(seen[-1] - seen[0]) + 1:
        raise AerogelError(f"{place} has an attention_mask with holes; padding is expected at the ends of rows only")
    return row_L[seen]
