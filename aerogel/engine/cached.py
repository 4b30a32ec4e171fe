"""Runs a live pipeline under a policy for a while, saved or measured on the spot; afterwards the pipeline is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aerogel.engine import policies
from aerogel.engine.calibration import Given, prepare, shown
from aerogel.engine.policies import Measured
from aerogel.engine.result import Result
from aerogel.engine.run import seeded
from aerogel.errors import AerogelError
from aerogel.methods.method import RuntimePolicy
from aerogel.model.load import load
from aerogel.model.network import Network
from aerogel.recipe import Recipe

Policy = Result | Recipe | str | Path | Mapping[str, Any]


@contextmanager
def cached(model: Any, policy: Policy, *, samples: Given | None = None, seed: int = 0) -> Iterator[Sequence[Measured]]:
    """Put a policy on a pipeline (or a network, or a module) inside the context; what is measured of it is given back.

    `policy` is a folder that was saved with policies, a Result, or what a recipe is (a name, a file, a mapping) whose steps are all runtime
    policies: these are calibrated first, on `samples`. Raises AerogelError for anything else.
    """
    network = model if isinstance(model, Network) else load(model, lazy=False)
    found = _saved(policy)
    if found is None:
        found = _measured(network, Recipe.parse(policy), samples, seed)  # type: ignore[arg-type]
    with policies.on(network, found):
        yield found


def _saved(policy: Policy) -> Sequence[Measured] | None:
    """The policies that were measured before; None where they are still to be."""
    if isinstance(policy, Result):
        found: Sequence[Measured] = policy.policies
    elif isinstance(policy, str | Path) and Path(policy).is_dir():
        found = policies.load(Path(policy))
    else:
        return None
    if not found:
        raise AerogelError(f"{policy} has no runtime policies; expected what a recipe with one was saved as")
    return found


def _measured(network: Network, recipe: Recipe, samples: Given | None, seed: int) -> list[Measured]:
    if changing := [step.name for step in recipe.steps if not isinstance(step.method, RuntimePolicy)]:
        raise AerogelError(f"{changing[0]} changes the network for good, so it cannot be put on for a while; use aerogel.compress")
    calls = prepare(network, shown(network, samples), seed, head=False).calls
    made: list[Measured] = []
    for number, step in enumerate(recipe.steps):
        assert isinstance(step.method, RuntimePolicy), "all are"
        with policies.on(network, made), seeded(seed, number):
            state = step.method.calibrate(network, calls)
        made.append(Measured(step, state))
    return made
