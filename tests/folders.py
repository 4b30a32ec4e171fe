"""Tiny models saved as Hugging Face folders, and text to calibrate on: what the engine and the command line work on in tests."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.tiny import FAMILIES
from tests.words import WORDS, tokenizer


def model_folder(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", seed: int = 0, **config: Any
) -> Path:
    """Save a tiny network with a word tokenizer; `config` overrides settings of its class."""
    tiny = FAMILIES[name]
    network = replace(tiny, make=partial(tiny.make, **config)).build(seed).to(dtype)
    network.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def text_file(path: Path, count: int = 3000, seed: int = 0) -> Path:
    """Write a text of `count` words that the tokenizer knows."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=count)))
    return path


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its content."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
