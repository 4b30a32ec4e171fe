"""Names in the aerogel.json of earlier releases, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA = 2
"""What aerogel.json says now; 1 has the old names."""
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


def renamed(step: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Return a step {method: options} of any release under the names of today."""
    return {METHODS.get(name, name): _keys(options or {}, OPTIONS) for name, options in step.items()}


def upgraded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of an aerogel.json of any release under the names of today."""
    if facts.get("schema", 1) >= SCHEMA:
        return dict(facts)
    found = dict(facts) | {"schema": SCHEMA}
    if isinstance(recipe := facts.get("recipe"), Mapping):
        found["recipe"] = {**recipe, "steps": [renamed(step) for step in recipe.get("steps", [])]}
    if isinstance(metrics := facts.get("metrics"), Mapping):
        found["metrics"] = {side: _measures(measured) for side, measured in metrics.items()}
    if isinstance(policies := facts.get("policies"), list):
        found["policies"] = [{**policy, "step": renamed(policy["step"])} if "step" in policy else policy for policy in policies]
    return found


def _measures(measured: Any) -> Any:
    if not isinstance(measured, Mapping):
        return measured
    return {MEASURES.get(name, name): _keys(figures, FIGURES) for name, figures in measured.items()}


def _keys(values: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {names.get(key, key): value for key, value in values.items()}
