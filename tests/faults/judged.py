"""Running a command on damaged input, and what is wrong with how it ended: a traceback, a hang, no clear line, or a silent acceptance."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import typer
from click.testing import CliRunner, Result

from aerogel.cli.commands import app

COMMANDS: Any = typer.main.get_command(app)
"""All commands."""
SECONDS = 10
"""Processor time of a command at most, unless it says otherwise."""
_PATIENCE = 6
"""Seconds of a command at most for each of these, whatever it waits for."""
_MEMORY = 4 << 30
"""Bytes of address space that a command may take beside what the process has."""


@contextmanager
def _hub() -> Iterator[None]:
    """A hub that takes whatever is pushed, and has no model."""
    offline = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    taken = mock.patch.multiple("aerogel.engine.pushing", _require_writer=mock.Mock(), _files=mock.Mock(return_value=[]))
    with offline, taken, mock.patch("huggingface_hub.HfApi"):
        yield


class Hung(BaseException):
    """A command that did not end; no code of the product catches it."""


@dataclass(frozen=True)
class Command:
    """A command line on one kind of input."""

    name: str
    words: Callable[[Path, Path], tuple[object, ...]]
    """(input, place for an output that is not there) -> the words of the command line."""
    meaning: Callable[[str, Path], object] = field(default=lambda told, output: told)
    """(standard output, place of the output) -> what the command found or made; two that mean the same are equal."""
    seconds: int = SECONDS
    """Processor time at most."""


@dataclass(frozen=True)
class Ended:
    """Outcome of a command."""

    code: int
    told: str
    """Text on standard error."""
    meaning: object
    fault: str | None
    """Reason why no command may end like this, whatever it was given."""


def run(command: Command, given: Path, output: Path, known_as: Path | None = None) -> Ended:
    """Run a command on an input; `known_as` is the path that stands for the input's own in what the command found."""
    ended = run_words([str(word) for word in command.words(given, output)], command.seconds)
    if ended.code != 0:
        return ended
    return replace(ended, meaning=command.meaning(str(ended.meaning).replace(str(given), str(known_as or given)), output))


def run_words(words: Sequence[str], seconds: int = SECONDS) -> Ended:
    """Run a command line; its meaning is what it prints."""
    try:
        with _limited(seconds), _hub(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = CliRunner().invoke(COMMANDS, list(words))
    except Hung:
        return Ended(1, "", None, f"hang: not done after {seconds} s")
    return Ended(found.exit_code, found.stderr, found.stdout, _fault(found))


def _fault(found: Result) -> str | None:
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        return f"traceback: {found.exception!r}"[:300]
    if found.exit_code not in (0, 2):
        return f"exit code {found.exit_code}"
    errors = [line for line in found.stderr.splitlines() if line.lower().startswith("error: ")]
    others = [line for line in found.stderr.splitlines() if not line.lower().startswith(("error: ", "warning: ", "usage: ", "try "))]
    if found.exit_code == 2 and not errors:
        return f"no line that starts with error: {found.stderr[-300:]!r}"
    if any(line.strip() for line in others):
        return f"other lines on standard error: {others[0][:200]!r}"
    return None


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise Hung in what takes too long inside, and MemoryError in what takes too much memory."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in before.items():
            signal.signal(number, handler)
