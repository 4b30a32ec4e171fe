"""Options are the fields of a dataclass; their types and bounds are checked alike in a recipe and in Python."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, Strict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from aerogel.errors import AerogelError
from aerogel.numerics.scheme import Scheme

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, Field(ge=1, le=1_000_000_000_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Guidance = Annotated[float, Field(ge=0, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=65_536)]
Batch = Annotated[int, Field(ge=1, le=65_536)]
Threads = Annotated[int, Field(ge=1, le=1024)]

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


class Options:
    """A dataclass of options that refuses values of another type or out of range, however it is made."""

    def __post_init__(self) -> None:
        """Check every option; raises AerogelError that names the first wrong one, its value and what is expected."""
        cls: Any = type(self)
        name = cls.__module__.rpartition(".")[2]
        for option in _hints(cls):
            checked(cls, option, getattr(self, option), f"{name}: option {option!r}")


def checked(cls: Any, option: str, value: Any, where: str) -> Any:
    """Return an option's value as the dataclass holds it; raises AerogelError where its type or its range is another."""
    try:
        return _adapter(cls, option).validate_python(value)
    except ValidationError as error:
        raise AerogelError(f"{where}: {_reason(error, _hints(cls)[option])}") from error


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    """The type of each option that the dataclass is made with."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _adapter(cls: Any, option: str) -> TypeAdapter[Any]:
    return TypeAdapter(_border_type(_hints(cls)[option]), config=_STRICT)


def _border_type(hint: Any) -> Any:
    """An option's type as recipes may write it: lists stand for tuples and sets, names and mappings for schemes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Scheme or Scheme in args:
        return Annotated[Any, PlainValidator(_scheme_or_none if type(None) in args else _scheme)]
    if not args or origin in (Literal, Annotated):
        return hint
    inner = tuple(arg if arg is Ellipsis else _border_type(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, inner)
    rebuilt = origin[inner]
    return Annotated[rebuilt, Strict(False)] if origin in (tuple, set, frozenset) else rebuilt


def _scheme(value: Any) -> Scheme | str:
    """A scheme as it was given, once it is known to be one."""
    if not isinstance(value, Scheme | str | Mapping):
        raise AerogelError("a scheme is a name such as W4A16_G64 or a mapping {preset, group, symmetric}")
    parsed = Scheme.parse(value)
    return value if isinstance(value, str) else parsed


def _scheme_or_none(value: Any) -> Scheme | str | None:
    return None if value is None else _scheme(value)


def _reason(error: ValidationError, hint: Any) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    if first["type"] in _OUT_OF_RANGE:
        return f"expected {_range(hint)}, got {first['input']!r}"
    return reason(error)


def reason(error: ValidationError) -> str:
    """Say the first thing that is wrong with a value in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
    return f"{place}: {message}{got}" if place else f"{message}{got}"


def _range(hint: Any) -> str:
    """The numbers that a type takes, in words."""
    at_least, above = _bound(hint, "ge"), _bound(hint, "gt")
    at_most, below = _bound(hint, "le"), _bound(hint, "lt")
    start = f"above {_shown(above)}" if above is not None else f"of at least {_shown(at_least)}" if at_least is not None else ""
    end = f"below {_shown(below)}" if below is not None else f"at most {_shown(at_most)}" if at_most is not None else ""
    if at_least is not None and end:
        words = f"from {_shown(at_least)} to {end.removeprefix('at most ')}"
    else:
        words = " and ".join(part for part in (start, end) if part)
    others = [repr(name) for part in typing.get_args(hint) if typing.get_origin(part) is Literal for name in typing.get_args(part)]
    return " or ".join([f"a number {words}" if words else "a finite number", *others])


def _shown(bound: float) -> str:
    return f"{bound:,.0f}" if bound >= 1000 else f"{bound:g}"


def _bound(hint: Any, side: Literal["ge", "gt", "le", "lt"]) -> float | None:
    """The bound on one side that a type, or a part of it, declares."""
    if typing.get_origin(hint) is Annotated:
        declared = [rule for extra in hint.__metadata__ if isinstance(extra, FieldInfo) for rule in extra.metadata]
        found = [getattr(rule, side) for rule in declared if hasattr(rule, side)]
    else:
        found = [bound for part in typing.get_args(hint) if (bound := _bound(part, side)) is not None]
    return next((float(bound) for bound in found), None)
