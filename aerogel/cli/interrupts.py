"""Turns Ctrl-C and SIGTERM into one line that says what is left of the work, whatever the code they hit makes of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from aerogel.cli.launched import in_processes
from aerogel.errors import AerogelError


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Raise AerogelError("interrupted; " + left()) when Ctrl-C is pressed or SIGTERM comes inside.

    torchrun ends the other processes of a run that failed by SIGTERM; these say nothing. Native code may put an error of its own in place
    of the KeyboardInterrupt (reading safetensors: "could not determine the shape"), so whatever ends the work after the signal is taken
    for the interruption.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    before = {number: signal.getsignal(number) for number in ((signal.SIGINT,) if in_processes() else (signal.SIGINT, signal.SIGTERM))}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # shells have their jobs in the background ignore Ctrl-C
            signal.signal(number, press)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if pressed or isinstance(error, KeyboardInterrupt):
            raise AerogelError(f"interrupted; {left()}") from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
