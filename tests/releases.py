"""The installed release of compressed-tensors, and what transformers opens through it."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from aerogel.io.packed_words import FIRST

LIBRARY = Version(version("compressed-tensors"))
DENSE = Version(FIRST) <= LIBRARY
"""Codes of 3 bits are packed as they are here; zero points of packed weights are expected unpacked, as nobody writes them."""
