"""The one error that a user can mend: it names the thing, what was expected and what to do."""

from __future__ import annotations


class AerogelError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with code 2."""
