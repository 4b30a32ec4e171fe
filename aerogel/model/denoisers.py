"""Several denoisers of one pipeline as one network: Wan 2.2 has one for the steps with much noise and one for those with little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from aerogel.model.family import Family

ARGUMENT = "denoiser"
"""The argument that names the denoiser that a call is for; its own forward does not get it."""


class Denoisers(nn.Module):
    """Denoisers by the names that they have in their pipeline. The pipeline calls them directly; calibration calls go through here."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, denoiser: str, **kwargs: Any) -> Any:
        """Run the denoiser that is named."""
        return self.get_submodule(denoiser)(*args, **kwargs)


def entries(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the modules that are called in a generation, and what a call through `module` has beside their arguments."""
    if isinstance(module, Denoisers):
        return [(part, {ARGUMENT: name}) for name, part in module.named_children()]
    return [(module, {})]


def family_of_all(family: Family, names: Iterable[str]) -> Family:
    """Return the family of several denoisers of one kind: patterns are those of each; nothing is known of what could be cached in them."""
    names = tuple(names)

    def of_each(patterns: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{name}.{pattern}" for name in names for pattern in patterns)

    sets = dict(family.pattern_sets) | ({"time_path": family.expand_patterns(("@time_path",))} if family.time is not None else {})
    return Family(
        family.name,
        family.matches,
        of_each(family.never_quantize),
        pattern_sets=tuple((key, of_each(patterns)) for key, patterns in sets.items()),
        modality=family.modality,
    )
