"""Replacement layers: modules that take the place of a model's own, and say themselves how they are described and rebuilt.

A new kind of layer is one file here with one class: config.json names the kind by the file, and nothing else has to know of it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from torch import nn

from aerogel.errors import AerogelError
from aerogel.numerics.scheme import Scheme

_FOLDER = Path(__file__).parent


class Assigned(NamedTuple):
    """Scheme of the weight of one layer."""

    scheme: Scheme
    act_order: bool = False


class Replacement(nn.Module, ABC):
    """Base of replacement layers; what a layer keeps in parameters and persistent buffers is what is stored."""

    effect: ClassVar[str]
    """The end of a message about such a layer, behind its name: what formats of plain quantized layers cannot express."""
    in_groups: ClassVar[bool] = False
    """True where the config_groups of a quantization_config give the scheme of its weight."""

    @property
    def assigned(self) -> Assigned | None:
        """Scheme of the weight; None for layers that have none of their own."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any] | None:
        """Return what `rebuild` needs beside the tensors, as JSON; None where compressed-tensors says everything."""

    @classmethod
    @abstractmethod
    def rebuild(cls, layer: nn.Module, told: Mapping[str, Any], assigned: Assigned | None) -> Self:
        """Return such a layer in the place of `layer`, with nothing in it, ready for the checkpoint's tensors.

        `told` is what `describe` returned; `assigned` is what the config_groups say, for classes that are in them.
        """

    def refuse(self) -> str | None:
        """Return why it cannot be stored, or None when it can."""
        return None


def kind_of(layer: Replacement) -> str:
    """Return the kind of a layer: the name of the file that defines its class."""
    return type(layer).__module__.rpartition(".")[2]


def class_of(kind: str) -> type[Replacement]:
    """Return the class of a kind; raises AerogelError for one that this release does not know."""
    # The name comes from a file: only modules of this folder are imported.
    if not kind.isidentifier() or not (_FOLDER / f"{kind}.py").is_file():
        raise AerogelError(f"quantization_config has layers of the kind {kind!r}, which is unknown; a newer release may open the folder")
    module = importlib.import_module(f"{__package__}.{kind}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    for found in own:
        if issubclass(found, Replacement) and found is not Replacement:
            return found
    raise AerogelError(f"quantization_config has layers of the kind {kind!r}, which is no replacement layer; the config is damaged")
