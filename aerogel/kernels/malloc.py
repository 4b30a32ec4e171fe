"""The C heap: freed tensors go back to the system, where glibc would keep their pages for the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MIB = 2**20
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of mallopt(3)."""


def release_pages() -> None:
    """Give freed heap pages back to the system: glibc keeps up to all of them (measured: 200 of 200 MB in 1 MB tensors)."""
    malloc_trim = _from_libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@contextmanager
def limit_fragmentation() -> Iterator[None]:
    """Tensors from 1 MiB up get pages of their own, which leave with them, until the context ends.

    By itself glibc raises that limit to 32 MiB as soon as such a tensor is freed, and then holes between tensors that live stay
    with the process (measured on blocks of 84 MB: a peak of 506 MB, and 355 MB with the limit, in the same time). A limit of the
    user's own is left alone.
    """
    mallopt = None if "MALLOC_MMAP_THRESHOLD_" in os.environ else _from_libc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, MIB)
    mallopt(TRIM_THRESHOLD, MIB)
    try:
        yield
    finally:  # where glibc's own rule ends on 64-bit machines: what was set cannot be unset
        mallopt(MMAP_THRESHOLD, 32 * MIB)
        mallopt(TRIM_THRESHOLD, 64 * MIB)


def _from_libc(name: str) -> Any:
    """A function of glibc, or None where there is none (musl has neither)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
