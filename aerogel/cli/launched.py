"""Commands that torchrun started in several processes: one of them prints, and an error is printed once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def in_processes() -> bool:
    """Return True where torchrun started this process and others of the same run."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def one_prints() -> Iterator[None]:
    """Let only the first of several processes write to the terminal while this lasts; a crash is shown wherever it happens."""
    if not in_processes() or os.environ.get("RANK") == "0":
        yield
        return
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def may_report() -> bool:
    """Return True in the process that reports an error: the first to fail, where several do or lose touch with one that did."""
    if not in_processes():
        return True
    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
        return store.add("aerogel/reported", 1) == 1
    except RuntimeError:  # torchrun is ending
        return False
