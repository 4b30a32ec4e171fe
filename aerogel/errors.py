"""The one error that a user can correct: it names the thing, what was found and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches


class AerogelError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names that are quoted may have line breaks


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names closest to a mistyped one, or all of them when none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known are {', '.join(known)}" if known else "; there are none"


def reason_of(error: Exception) -> str:
    """Return the reason that the operating system or a library gives, without the number of the error and the file."""
    return getattr(error, "strerror", None) or str(error)


def reasons(look: Callable[[], object]) -> Iterator[str]:
    """Yield the text of the AerogelError that `look` raises; nothing where it raises none."""
    try:
        look()
    except AerogelError as error:
        yield str(error)
