"""Runs a live pipeline or model under a policy for a while, saved or measured on the spot; afterwards it is what it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from aerogel.engine import policies
from aerogel.engine.calibration import CalibrationInput, prepare, reading, shown
from aerogel.engine.in_parts import in_parts, wants_parts
from aerogel.engine.opening import open_model
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.preflight import check_calls, check_steps
from aerogel.engine.result import Result
from aerogel.engine.stages import seeded
from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.io.record.schema import ModelRecord
from aerogel.io.save import fingerprint_of
from aerogel.methods.base import RuntimePolicy
from aerogel.model.network import Network
from aerogel.recipe import Recipe

Policy = Result | Recipe | str | Path | Mapping[str, Any]


@contextmanager
def cached(model: Any, policy: Policy, *, samples: CalibrationInput | None = None, seed: int = 0) -> Iterator[Sequence[CalibratedPolicy]]:
    """Put a policy on a pipeline (or a network, a module, a pair of module and processor) inside the context and give back what is known.

    `policy` is a folder that was saved with policies or that the exporter `cache_policy` wrote, a Result, or what a recipe is (a name, a
    file, a mapping) whose steps are all runtime policies: these are calibrated first, on `samples`. Raises AerogelError for anything else,
    and for a network of another family, with other modules or blocks. A folder of that exporter also says which weights it was made for;
    others are a warning.
    """
    network = model if isinstance(model, Network) else open_model(model, lazy=False, unfuse_experts=False)
    found = _saved(policy)
    if found is None:
        found = _measured(network, Recipe.parse(policy), samples, seed)  # type: ignore[arg-type]
    made_for = _made_for(policy)
    _require_family(network, made_for)
    with policies.on(network, found):
        _compare_weights(network, made_for)
        yield found


skipping = cached
"""The same, as it is called where experts are skipped: fused experts stay fused, and run through the implementation `aerogel`."""


def _saved(policy: Policy) -> Sequence[CalibratedPolicy] | None:
    """The policies that were measured before; None where they are still to be."""
    if isinstance(policy, Result):
        found: Sequence[CalibratedPolicy] = policy.policies
    elif isinstance(policy, str | Path) and Path(policy).is_dir():
        files.verify(policy)
        found = policies.load(Path(policy))
    else:
        return None
    if not found:
        raise AerogelError(f"{policy} has no runtime policies; expected what a recipe with one was saved as")
    return found


def _made_for(policy: Policy) -> ModelRecord | None:
    """Return the record of the model that saved policies were made for; None for policies that are calibrated here."""
    if isinstance(policy, Result):
        return policy.record.model
    if isinstance(policy, str | Path) and Path(policy).is_dir():
        return files.read(policy).model
    return None


def _require_family(network: Network, made_for: ModelRecord | None) -> None:
    if made_for is not None and made_for.family != network.family.name:
        raise AerogelError(
            f"the policy was made for {made_for.name}, of the {made_for.family} family, and this model is of the "
            f"{network.family.name} family; make one for it"
        )


def _compare_weights(network: Network, made_for: ModelRecord | None) -> None:
    """Warn where it is known which weights a policy was made for, and these are others."""
    if made_for is not None and made_for.fingerprint is not None and (ours := fingerprint_of(network)) != made_for.fingerprint:
        warnings.warn(
            f"the policy was made for {made_for.name} with weights {made_for.fingerprint}, this model has {ours}: "
            "it runs, but what was measured of it holds for those",
            stacklevel=4,  # of who enters the context
        )


def _measured(network: Network, recipe: Recipe, samples: CalibrationInput | None, seed: int) -> list[CalibratedPolicy]:
    if changing := [step.name for step in recipe.steps if not isinstance(step.method, RuntimePolicy)]:
        raise AerogelError(f"{changing[0]} changes the weights permanently, so it cannot be enabled temporarily; use aerogel.compress")
    given = shown(network, samples)
    check_steps(network, recipe, reading(network, given))
    calls = prepare(network, given, seed, head=False).calls
    check_calls(network, recipe, calls)
    made: list[CalibratedPolicy] = []
    for number, step in enumerate(recipe.steps):
        before = policies.superseded(step, made)
        made = made if before is None else made[:-1]
        with policies.on(network, made), seeded(seed, number):
            assert isinstance(step.method, RuntimePolicy), "others were refused"
            with in_parts(network, calls[0]) if wants_parts(step.method) else nullcontext():
                made.append(policies.calibrated(network, step, calls, before))
    return made
