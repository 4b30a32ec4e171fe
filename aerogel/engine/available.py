"""How much calibration data there is, before any work: a text or a file of chats may hold less than is asked for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TypeVar

from aerogel.data import chats, denoising, sources, text
from aerogel.data.chats import Chats
from aerogel.data.denoising import Denoising
from aerogel.data.needles import Needles
from aerogel.data.records import columns_of
from aerogel.engine.calibration import Samples, Shown, hidden
from aerogel.model.network import Network

_Counted = TypeVar("_Counted", Samples, Chats)


def available(network: Network, asked: Shown) -> Shown:
    """Return the calibration data as it will be: with fewer sequences or chats where there are no more, and a warning.

    Raises AerogelError, as the run itself would, when the source cannot be read or is too short for one sequence, and where a pipeline
    cannot be asked for such images.
    """
    if isinstance(asked, Denoising) and hasattr(network.processor, "scheduler"):
        denoising.check(network.processor, asked)
    if isinstance(asked, Chats):
        return _at_most(asked, len(chats.read(asked.source, asked.column)), "chats")
    if isinstance(asked, Needles):
        hidden(network, replace(asked, count=1), 0)  # says what is wrong
    tokenizer = getattr(network.processor, "tokenizer", network.processor)
    if not isinstance(asked, Samples) or tokenizer is None:
        return asked
    body = asked.length - len(text.opening(tokenizer))
    found = len(text.tokens(tokenizer, asked.source, asked.count * body, asked.column)) // body if body > 0 else 0
    if not found:
        text.samples(tokenizer, asked.source, asked.count, asked.length, column=asked.column)  # says what is wrong
    return _at_most(asked, found, f"sequences of {asked.length} tokens")


def columns_read(asked: Shown) -> tuple[str, ...]:
    """Return a line that says which columns of a source with records are read, by its first record; nothing for plain text."""
    if not isinstance(asked, Samples) or not sources.is_named(asked.source):
        return ()
    first = next(sources.records(asked.source), None)
    columns = () if first is None else columns_of(first.value, asked.column)
    return (f"calibration reads {' and '.join(columns)} of {asked.source}",) if columns else ()


def _at_most(asked: _Counted, found: int, what: str) -> _Counted:
    if found < asked.count:
        warnings.warn(f"{sources.name_of(asked.source)!r} gives {found} of the {asked.count} {what} asked for", stacklevel=2)
    return replace(asked, count=min(asked.count, found))
