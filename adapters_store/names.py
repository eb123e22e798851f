"""Names of adapters, aliases and versions, and the grammar of a reference.

    sql          what the alias `default` of adapter "sql" points to
    sql@prod     what the alias `prod` points to
    sql@3        version 3, for good
    org/sql@3    a name may have one slash

The name's grammar is a security boundary: a server decodes `%2F` before it routes, so a path may bring anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters_store.errors import InvalidName

DEFAULT_ALIAS = "default"

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})?", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_LOOKS_LIKE_VERSION = re.compile(r"v[0-9]+", re.ASCII)
_ROUTES = frozenset({"versions", "aliases", "load", "unload", "metrics"})  # would hide an admin route


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference: exactly one of `version` and `alias` is set."""

    name: str
    version: int | None
    alias: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias if self.version is None else self.version}"


def check_name(name: str) -> str:
    """The name itself. Raises InvalidName saying which rule it breaks."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidName(
            f"{name[:120]!r} is no adapter name: letters, digits, '.', '_' and '-' (1 to 100, the first a letter or "
            "digit, no '..'), at most one '/' between two such parts."
        )
    taken = [part for part in name.split("/") if part in _ROUTES]
    if taken:
        raise InvalidName(f"{name!r}: {taken[0]!r} is a word of the admin paths. Choose another name.")
    return name


def check_alias(alias: str) -> str:
    """The alias itself. Raises InvalidName saying which rule it breaks."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidName(
            f"{alias[:80]!r} is no alias: lower-case letters, digits, '_' and '-' (1 to 63, the first a letter)."
        )
    if alias == "latest" or _LOOKS_LIKE_VERSION.fullmatch(alias):
        raise InvalidName(f"{alias!r} is no alias: it reads like a version. Say name@3 for version 3.")
    return alias


def parse_reference(text: str) -> Reference:
    """`name`, `name@alias` or `name@version`. Raises InvalidName."""
    name, at, selector = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name, None, DEFAULT_ALIAS)
    if _VERSION.fullmatch(selector):
        return Reference(name, int(selector), None)
    return Reference(name, None, check_alias(selector))
