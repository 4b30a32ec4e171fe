"""A tiny vision-language MoE model with a real tokenizer and image processor, and chats about real images for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from aerogel.data.chats import Chat
from aerogel.io.processors import Pair

ZOO = Path(__file__).parents[1] / "zoo"


def zoo(name: str) -> Any:
    """A script of the zoo as a module."""
    sys.path.insert(0, str(ZOO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ZOO))


def asked(count: int, seed: int = 0) -> list[Chat]:
    """Held-out questions with their answers."""
    collages, trained = zoo("collages"), zoo("fashion_vlm")
    return [trained.chat(turn) for turn in collages.draw(collages.Items.held_out(), count, seed)]


def written(folder: Path, count: int, seed: int = 0) -> Path:
    """The same as a file."""
    collages = zoo("collages")
    path: Path = collages.write(collages.draw(collages.Items.held_out(), count, seed), folder)
    return path


def untrained() -> tuple[Any, Pair]:
    """The zoo's network with random weights, and its processor."""
    trained = zoo("fashion_vlm")
    pair: Pair = trained.processor(zoo("collages").Items.held_out())
    return trained.build(pair.tokenizer).eval(), pair
