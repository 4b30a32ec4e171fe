"""The stages of a run: which steps share a walk, what they reach and start from, and the random numbers of each part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch

from aerogel.methods.base import BlockMethod, TargetedMethod, WeightMethod
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from aerogel.recipe import Recipe, Step


def reaches_around(network: Network, steps: Iterable[Step]) -> bool:
    """Tell whether block methods have linear layers to change outside the blocks."""
    *_, around = blocks_of(network)
    methods = [step.method for step in steps if isinstance(step.method, BlockMethod)]
    return any(_acts_on(method, around) for method in methods)


def _acts_on(method: BlockMethod, block: Block) -> bool:
    if isinstance(method, WeightMethod):
        return bool(method.assign(block))
    return not isinstance(method, TargetedMethod) or bool(method.targeted(block))


def quantizes_weights(recipe: Recipe) -> bool:
    """Return True where a step gives layers a number format: a model that came quantized is opened as a float model for it."""
    return any(step.method.quantizes for step in recipe.steps)


def stages_of(recipe: Recipe) -> list[list[Step]]:
    """Return the steps in groups: neighbouring block methods together, every other step alone."""
    stages: list[list[Step]] = []
    for shared, group in groupby(recipe.steps, lambda step: isinstance(step.method, BlockMethod)):
        steps = list(group)
        stages += [steps] if shared else [[step] for step in steps]
    return stages


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Random numbers that depend on the run's seed and the place in it only, so that a resumed run draws the same."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
