"""Names of methods and options in the aerogel.json of earlier releases, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
OPTIONS: Mapping[str, str] = {}
"""By their old names, whatever the method."""


def renamed(step: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a step {method: options} under the names of today."""
    return {
        METHODS.get(name, name): {OPTIONS.get(option, option): value for option, value in options.items()} for name, options in step.items()
    }
