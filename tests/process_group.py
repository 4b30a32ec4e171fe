"""Processes as torchrun starts them, with its environment and its store; they begin imported, which saves most of the time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore

from tests import crashing_runs

assert crashing_runs  # one preload is for all children
_CONTEXT = multiprocessing.get_context("forkserver")


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; minus the signal that killed it."""
    answer: Any
    """What its work returned."""
    printed: str
    """What it wrote to its standard output and standard error."""


def run(folder: Path, work: Callable[..., Any], *given: Any, count: int = 2, patience: int = 180) -> list[Ended]:
    """Do `work(*given)` in `count` processes, which join each other where it calls Processes.join(); none may hang."""
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    children = [_CONTEXT.Process(target=_work, args=(folder, store.port, rank, count, work, given)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(patience)
        child.kill()
        child.join()
    return [_ended(child, folder, rank) for rank, child in enumerate(children)]


def _ended(child: Any, folder: Path, rank: int) -> Ended:
    answer, printed = folder / f"{rank}.answer", folder / f"{rank}.txt"
    return Ended(child.exitcode, pickle.loads(answer.read_bytes()) if answer.exists() else None, printed.read_text())


def _work(folder: Path, port: int, rank: int, count: int, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    with (folder / f"{rank}.txt").open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.__stdout__ = sys.__stderr__ = file  # type: ignore[misc]
        try:
            answer = work(*given)
        except Exception:
            traceback.print_exc()
            raise
        (folder / f"{rank}.answer").write_bytes(pickle.dumps(answer))
