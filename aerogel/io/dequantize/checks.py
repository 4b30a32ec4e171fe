"""Checks of the tensors that belong to one quantized weight, and of the numbers that a quantization_config holds; errors name both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aerogel.errors import AerogelError
from aerogel.io.headers import Entry

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that scales have."""
_AGAIN = "fetch config.json again, or give the original model in 16 bits"


@dataclass(frozen=True)
class Tensors:
    """Tensors of a folder whose config.json names one format."""

    where: Path
    """The config.json."""
    method: str
    entries: Mapping[str, Entry]

    def require_some(self, found: Mapping[str, object], lacking: str) -> None:
        """Raise AerogelError where no weight was found at all."""
        if not found:
            raise AerogelError(f"{self.where} says {self.method}, and {lacking}; get the config.json that belongs to the weights")

    def required(self, name: str, of: str) -> Entry:
        """Return a tensor that another one needs; raises AerogelError where it is missing."""
        if name not in self.entries:
            raise AerogelError(f"{self.where} says {self.method}, and {of} has no {name}; get all files of the model again")
        return self.entries[name]

    def matrix(self, name: str, of: str, dtypes: Collection[torch.dtype]) -> tuple[int, int]:
        """Return the shape of a tensor that has to be a matrix of one of these dtypes, with something in it."""
        entry = self.required(name, of)
        if len(entry.shape) != 2 or 0 in entry.shape or entry.dtype not in dtypes:
            raise self._wrong(name, of, "a matrix", dtypes)
        return entry.shape[0], entry.shape[1]

    def expect(self, name: str, of: str, dtypes: Collection[torch.dtype], *shapes: tuple[int, ...]) -> None:
        """Raise AerogelError unless a tensor is there with one of these shapes and dtypes."""
        entry = self.required(name, of)
        if entry.shape not in shapes or entry.dtype not in dtypes:
            raise self._wrong(name, of, " or ".join(str(list(shape)) for shape in shapes), dtypes)

    def _wrong(self, name: str, of: str, shape: str, dtypes: Collection[torch.dtype]) -> AerogelError:
        entry = self.entries[name]
        beside = "" if name == of else f" for {of} {list(self.entries[of].shape)}"
        return AerogelError(
            f"{self.where.parent}: {name} is {list(entry.shape)} of {entry.dtype}, expected {shape} of "
            f"{' or '.join(map(str, dtypes))}{beside}; get the files of one model"
        )


def one_of(config: Mapping[str, Any], where: Path, keys: Collection[str], known: Collection[Any], usual: Any = None) -> Any:
    """Return the value of the first of these keys that a config has, or the usual one; raises AerogelError where it is none of `known`."""
    key = next((key for key in keys if config.get(key) is not None), None)
    value = usual if key is None else config[key]
    if not any(type(value) is type(one) and value == one for one in known):
        options = ", ".join(str(one) for one in known)
        raise AerogelError(f"{where}: {key or next(iter(keys))} is {value!r}, expected one of {options}; {_AGAIN}")
    return value


def group_size(config: Mapping[str, Any], where: Path, keys: Collection[str] = ("group_size",)) -> int:
    """Return the size of groups that a config says; -1 stands for whole rows."""
    key = next((key for key in keys if config.get(key) is not None), None)
    value = config[key] if key is not None else 128
    if type(value) is not int or not (value == -1 or 1 <= value < 2**31):
        raise AerogelError(f"{where}: {key} is {value!r}, expected -1 or a positive integer such as 128; {_AGAIN}")
    return value


def group_of(sizes: Collection[int], inputs: int, groups: int) -> int | None:
    """Return which of these sizes divides a row of so many inputs into so many groups; None where none does."""
    fitting = (size if size != -1 else inputs for size in sizes)
    return next((size for size in fitting if inputs % size == 0 and inputs // size == groups), None)
