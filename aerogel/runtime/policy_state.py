"""The state of a runtime policy: a typed, frozen record of small tensors and numbers, one class a technique, saved under flat keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from aerogel.errors import AerogelError

_BY_NAME = "by_name"
_KEY = "key"


@dataclass(frozen=True, eq=False)
class PolicyState:
    """Result of a policy's calibration; subclasses add fields: tensors, numbers, texts, tuples and mappings of these.

    On disk tensors go to safetensors and the rest to JSON, each field under its own name or the one that `saved_as` gives it. Fields with a
    default may be absent.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return what is saved, by key; fields that are None are left out, entries of a `by_name` field have keys of their own."""
        saved: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata.get(_BY_NAME):
                assert not saved.keys() & value.keys(), "a name is that of a field"
                saved |= value
            elif value is not None:
                saved[_key(one)] = _plain(value)
        return saved

    @classmethod
    def read(cls, saved: Mapping[str, Any], policy: str) -> Self:
        """Read what `as_dict` gave, or its JSON; raises AerogelError that names the policy and the field."""
        known = {_key(one): one for one in fields(cls)}
        named = [one for one in known.values() if one.metadata.get(_BY_NAME)]
        own = {key: value for key, value in saved.items() if key in known and known[key] not in named}
        others = {key: value for key, value in saved.items() if key not in own}
        for one in named:
            own[_key(one)] = {key: others.pop(key) for key in list(others) if isinstance(others[key], Tensor)}
        if others:
            raise AerogelError(f"{policy}: its saved state has an unknown field {next(iter(others))!r}; calibrate the policy anew")
        if missing := [name for name, one in known.items() if name not in own and _required(one)]:
            raise AerogelError(f"{policy}: its saved state has no field {missing[0]!r}; calibrate the policy anew")
        hints = get_type_hints(cls)
        names = {key: one.name for key, one in known.items()}
        return cls(**{names[key]: _checked(hints[names[key]], value, f"{policy}: field {key}") for key, value in own.items()})


def by_name() -> Any:
    """Declare a field `Mapping[str, Tensor]` whose entries are saved under their own keys beside the other fields; at most one a class."""
    return field(default_factory=dict, metadata={_BY_NAME: True})


def saved_as(key: str) -> Mapping[str, str]:
    """The metadata of a field that is saved under another key than its name, such as one that Python keeps for itself."""
    return {_KEY: key}


def _key(one: Field[Any]) -> str:
    key: str = one.metadata.get(_KEY, one.name)
    return key


def _required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _checked(hint: Any, value: Any, where: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(_frozen(value))
    except ValidationError as error:
        found = error.errors()[0]
        place = "".join(f"[{part!r}]" for part in found["loc"] if isinstance(part, int))
        raise AerogelError(f"{where}{place} of its saved state: {found['msg']}; calibrate the policy anew") from error


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what JSON gives back."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _frozen(value: Any) -> Any:
    """Lists as tuples, which is what fields hold."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(one) for one in value)
    return {key: _frozen(one) for key, one in value.items()} if isinstance(value, Mapping) else value
