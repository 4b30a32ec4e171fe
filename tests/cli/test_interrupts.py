"""Ctrl-C and SIGTERM end a command with one line, also where native code makes another error of them."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from aerogel.cli.interrupts import interruptible
from aerogel.errors import AerogelError


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Shells have their jobs in the background ignore the key, and tests may be such a job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def press_in_native_code() -> None:
    try:
        press()
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def press_in_a_parser() -> None:
    try:
        press()
    except KeyboardInterrupt:
        raise AerogelError("model.safetensors is broken") from None


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("work", [press, press_in_native_code, press_in_a_parser, stop])
def test_whatever_ends_the_work_is_the_interruption(work: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(AerogelError, match=r"^interrupted; half is kept$"), interruptible(lambda: "half is kept"):
        work()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"^wrong$"), interruptible(lambda: "nothing was changed"):
        raise ValueError("wrong")


def test_the_innermost_says_what_is_left() -> None:
    with (
        pytest.raises(AerogelError, match=r"^interrupted; half is kept$"),
        interruptible(lambda: "nothing was changed"),
        interruptible(lambda: "half is kept"),
    ):
        press_in_native_code()


def test_an_ignored_key_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(lambda: "nothing was changed"):
        press()


STARTING = """
import builtins, os, runpy, signal, sys
usual = builtins.__import__
def importing(name, *args, **kwargs):
    if name == module:
        os.kill(os.getpid(), signal.SIGINT)
    return usual(name, *args, **kwargs)
signal.signal(signal.SIGINT, signal.default_int_handler)
module, sys.argv[1:] = sys.argv[1], ["plan", "none", "--recipe", "rtn-w4a16"]
builtins.__import__ = importing
runpy.run_module("aerogel", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("typer", 130),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("torch", "numpy", "torch.nn", "transformers", "safetensors")),
    ],
)
def test_while_modules_are_imported(module: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", STARTING, module], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, "error: interrupted; nothing was changed\n")
