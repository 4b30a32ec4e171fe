"""The bases of all parts of a record: frozen, and closed or open to keys that are not declared."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part with declared keys only; another key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data as it is on disk: what was never set is absent."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class OpenPart(Part):
    """A part that keeps other keys too, for what methods and measures add."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any] = Field(init=False)
