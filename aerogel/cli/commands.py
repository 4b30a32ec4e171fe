"""The command line: all commands, registered with one application.

Each command parses its arguments, calls one function and prints; heavy libraries are imported when a command runs.
"""

from __future__ import annotations

from aerogel.cli import compress, measure, names, search, share
from aerogel.cli.app import app
from aerogel.cli.arguments import Kind
from aerogel.cli.launched import one_prints

__all__ = ["Kind", "app", "compress", "main", "measure", "names", "search", "share"]


def main() -> None:
    """Run the command line."""
    with one_prints():
        app()
