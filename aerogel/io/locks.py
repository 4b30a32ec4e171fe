"""Locks of outputs: of two runs on one machine that would write the same folder, the second is refused."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from aerogel.errors import AerogelError


@contextmanager
def locked(output: Path, patience: float = 0) -> Iterator[None]:
    """Keep other runs of this machine from an output for a while; raises AerogelError where one has it, after so many seconds.

    The lock lies among temporary files and goes with the process that holds it, however that ends.
    """
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"aerogel-{name}.lock", timeout=patience)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise AerogelError(f"another run is writing {output}; wait until it ends, or give another output") from error
    except OSError as error:
        raise AerogelError(f"{output} cannot be locked ({lock.lock_file}: {error.strerror or error}); remove that file") from error
    try:
        yield
    finally:
        lock.release()
