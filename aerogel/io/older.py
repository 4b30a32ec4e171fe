"""Names in the aerogel.json of earlier releases, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA = 3
"""The schema of aerogel.json and search.json today; 1 and 2 have some of the old names below."""
METHODS = {
    "evenly": "uniform_cache",
    "lower_k": "reduced_topk",
    "operands": "attention_quant",
    "ranges": "activation_ranges",
    "refined": "schedule_refine",
    "searched": "schedule_search",
    "split": "split_shortcut",
    "time_table": "temporal_cache",
}
OPTIONS = {
    "behind_linears": "include_linear_sources",
    "damping": "percdamp",
    "duo": "duo_scaling",
    "lost": "dropped",
    "slots": "cache_dtype",
    "waiting": "max_activation_gb",
    "without_edge": "unmapped",
}
MEASURES = {
    "agreement": "kl_divergence",
    "pictures": "image_similarity",
    "realism": "image_quality",
    "replies": "exact_match",
}
FIGURES = {"pictures_per_minute": "images_per_minute"}
PARTS = {"float layers": "unquantized layers", "norms and the rest": "norms and others"}
"""Parts of the size of a model."""
SKIPPED = {"lost": "dropped_tokens", "lost_of_layers": "dropped_tokens_by_layer"}
"""Figures of skipped experts."""
STATES = {"slot_bytes": "cache_bytes", "units": "modules"}
"""Fields of the states of feature-caching policies."""
SEARCHES = {"mixture": "moe", "units": "modules"}
PLAN = {"linears": "layers"}
COVERAGE = {"float_inputs": "unquantized_inputs", "float_weights": "unquantized_weights"}
NESTED = {"parts": PARTS, "skipped": SKIPPED}
"""Figures that have names of their own inside."""


def renamed(step: Any) -> Any:
    """Return a step {method: options} of any release under the names of today; what is no step is left for the schema to refuse."""
    if not isinstance(step, Mapping):
        return step
    return {METHODS.get(name, name): _keys(options or {}, OPTIONS) for name, options in step.items()}


def upgraded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of an aerogel.json of any release under the names of today; what is malformed is left for the schema to refuse."""
    if facts.get("schema", 1) >= SCHEMA:
        return dict(facts)
    found = dict(facts) | {"schema": SCHEMA}
    if isinstance(recipe := facts.get("recipe"), Mapping) and isinstance(steps := recipe.get("steps"), list):
        found["recipe"] = {**recipe, "steps": [renamed(step) for step in steps]}
    if isinstance(metrics := facts.get("metrics"), Mapping):
        found["metrics"] = {side: _measures(measured) for side, measured in metrics.items()}
    if "plan" in facts:
        found["plan"] = _keys(facts["plan"], PLAN)
    if "coverage" in facts:
        found["coverage"] = _keys(facts["coverage"], COVERAGE)
    if isinstance(policies := facts.get("policies"), list):
        found["policies"] = [_steps(policy) for policy in policies]
    return found


def upgraded_search(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a search.json of any release under the names of today."""
    if facts.get("schema", 1) >= SCHEMA:
        return dict(facts)
    found = {SEARCHES.get(key, key): value for key, value in facts.items()} | {"schema": SCHEMA}
    for key in ("rows", "left_out"):
        if isinstance(rows := facts.get(key), list):
            found[key] = [_row(row) for row in rows]
    return found


def _row(row: Any) -> Any:
    """A policy that was compared."""
    if not isinstance(row, Mapping):
        return row
    found = _figures(_steps(row))
    return {**found, "policy": METHODS.get(row["policy"], row["policy"])} if isinstance(row.get("policy"), str) else found


def _steps(policy: Any) -> Any:
    if not isinstance(policy, Mapping) or "step" not in policy:
        return policy
    found = {**policy, "step": renamed(policy["step"])}
    return {**found, "state": _keys(policy["state"], STATES)} if "state" in policy else found


def _measures(measured: Any) -> Any:
    if not isinstance(measured, Mapping):
        return measured
    return {MEASURES.get(name, name): _figures(figures) for name, figures in measured.items()}


def _figures(figures: Any) -> Any:
    found = _keys(figures, FIGURES)
    if not isinstance(found, Mapping):
        return found
    return {key: _keys(value, NESTED[key]) if key in NESTED else value for key, value in found.items()}


def _keys(values: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {names.get(key, key): value for key, value in values.items()}
