"""Aerogel makes generative models small and fast without losing what they can do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aerogel.version import __version__

if TYPE_CHECKING:
    from aerogel.engine.opening import load
    from aerogel.engine.planning import Plan, plan
    from aerogel.engine.result import Result
    from aerogel.engine.run import compress
    from aerogel.engine.scores import measure
    from aerogel.errors import AerogelError
    from aerogel.io.register import register_diffusers, register_transformers
    from aerogel.recipe import Recipe

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
    "register_transformers",
    "skipping",
]

# The module that defines each name; imported on first use, because torch alone takes longer to import than `aerogel --help` may take.
_MODULES = {
    "AerogelError": "aerogel.errors",
    "Plan": "aerogel.engine.planning",
    "Recipe": "aerogel.recipe",
    "Result": "aerogel.engine.result",
    "cached": "aerogel.engine.cached",
    "compress": "aerogel.engine.run",
    "load": "aerogel.engine.opening",
    "measure": "aerogel.engine.scores",
    "plan": "aerogel.engine.planning",
    "register_diffusers": "aerogel.io.register",
    "register_transformers": "aerogel.io.register",
    "skipping": "aerogel.engine.cached",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'aerogel' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
