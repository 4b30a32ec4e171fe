"""Tiny models saved as folders, with a word tokenizer and text to calibrate on: what the command line works on in tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from tests.tiny import FAMILIES
from tests.words import WORDS, tokenizer


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """Save a tiny network with a tokenizer as a Hugging Face folder."""
    FAMILIES[name].build().to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def words(path: Path, count: int = 3000, seed: int = 0) -> Path:
    """Write a text of `count` words that the tokenizer knows."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=count)))
    return path
