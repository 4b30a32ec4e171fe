"""Command line: commands and terminal output; no logic."""
