"""`python -m aerogel` is the command line."""

from __future__ import annotations

from aerogel.cli.commands import main

main()
