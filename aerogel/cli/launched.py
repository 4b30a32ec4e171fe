"""Commands that torchrun started in several processes: one of them prints, and an error is printed once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer

_CLAIMED, _SHOWN = "aerogel/claimed", "aerogel/shown"
_PATIENCE = timedelta(seconds=20)
"""How long a process that failed lives on at most until the error is printed: torchrun ends all once one of them has ended."""


def in_processes() -> bool:
    """Return True where torchrun started this process and others of the same run."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def one_prints() -> Iterator[None]:
    """Let only the first of several processes write to the terminal while this lasts; a crash is shown wherever it happens."""
    if not in_processes():
        yield
        return
    first = os.environ["RANK"] == "0"
    with Path(os.devnull).open("w") as nowhere, _writing(None if first else nowhere):
        try:
            yield
        except SystemExit as ended:
            if ended.code:
                _shown(first)
            raise


def report(line: str) -> None:
    """Print an error on standard error, once where several processes fail or lose touch with one that did."""
    if not in_processes():
        typer.echo(line, err=True)
        return
    with suppress(RuntimeError):  # torchrun is ending
        claimed = _store().add(_CLAIMED, 1) == 1
        if claimed:
            typer.echo(line, file=sys.__stderr__)
        _shown(claimed)


def _shown(here: bool) -> None:
    """Note that the error is printed, or wait until it is."""
    with suppress(RuntimeError):
        if here:
            _store().set(_SHOWN, "1")
        else:
            _store().wait([_SHOWN], _PATIENCE)


def _store() -> Any:
    """Return the key-value store that all processes read and write; torchrun keeps it."""
    from torch.distributed import rendezvous

    return next(rendezvous("env://"))[0]


@contextmanager
def _writing(file: Any) -> Iterator[None]:
    """Send what is printed to a file for a while, if one is given."""
    before = sys.stdout, sys.stderr
    if file is not None:
        sys.stdout = sys.stderr = file
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
