"""Aerogel makes generative models small and fast without losing what they can do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aerogel.engine.opening import load
    from aerogel.engine.planning import Plan, plan
    from aerogel.engine.result import Result
    from aerogel.engine.run import compress
    from aerogel.engine.scores import measure
    from aerogel.errors import AerogelError
    from aerogel.io.pipelines import register_diffusers
    from aerogel.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "AerogelError",
    "Plan",
    "Recipe",
    "Result",
    "__version__",
    "cached",
    "compress",
    "load",
    "measure",
    "plan",
    "register_diffusers",
    "skipping",
]

# Where each name lives; imported when first asked for, because torch alone takes longer to import than `aerogel --help` may take.
_HOMES = {
    "AerogelError": "aerogel.errors",
    "Plan": "aerogel.engine.planning",
    "Recipe": "aerogel.recipe",
    "Result": "aerogel.engine.result",
    "cached": "aerogel.engine.cached",
    "compress": "aerogel.engine.run",
    "load": "aerogel.engine.opening",
    "measure": "aerogel.engine.scores",
    "plan": "aerogel.engine.planning",
    "register_diffusers": "aerogel.io.pipelines",
    "skipping": "aerogel.engine.cached",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aerogel' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
