"""How settings are declared: a group with its heading, and fields with their default, help text and spellings."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, Field


class SettingGroup(BaseModel):
    """Settings that stand together in `--help` and in the README."""

    heading: ClassVar[str]


def setting(default: Any, text: str, **extra: Any) -> Any:
    """A field: its default, its help text; `aliases`, `metavar` and constraints by name."""
    schema = {"aliases": extra.pop("aliases", ()), "metavar": extra.pop("metavar", None)}
    return Field(default, description=text, json_schema_extra=schema, **extra)
