"""The command line: what is typed, and how answers look on a terminal; no logic."""
