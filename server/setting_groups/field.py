"""How a setting is declared: its default, its help text, and the heading that it stands under."""

from __future__ import annotations

from typing import Any

from pydantic import Field

GROUPS = ("Model", "Network", "Keys", "Adapters", "Load", "Memory and threads", "Observing")  # as `--help` shows them


def setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A field: its default, the heading in `--help`, its help text; `aliases`, `metavar` and constraints by name."""
    schema = {"group": group, "aliases": extra.pop("aliases", ()), "metavar": extra.pop("metavar", None)}
    return Field(default, description=text, json_schema_extra=schema, **extra)
