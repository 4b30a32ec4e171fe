"""Turns Ctrl-C into one line that says what is left of the work, whatever the code it hits makes of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from aerogel.errors import AerogelError


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Raise AerogelError("interrupted; " + left()) when Ctrl-C is pressed inside.

    Native code may put an error of its own in place of the KeyboardInterrupt (reading safetensors: "could not determine the shape"),
    so whatever ends the work after the key was pressed is taken for the interruption.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # shells have their jobs in the background ignore it
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if pressed or isinstance(error, KeyboardInterrupt):
            raise AerogelError(f"interrupted; {left()}") from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
