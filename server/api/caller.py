"""Who calls: the key's name, what it may do, and which adapters exist for it.

An adapter out of a caller's scope does not exist for it: the refusal is the one for a name that nobody ever gave, so
neither the text nor the status tells the two apart.

Running example: Caller("bi", {"generate"}, ("sql", "bi/*"))
    sees("sql"), sees("bi/red")      yes
    sees("sql2"), sees("pirate")     no
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import Request

from adapters_store.catalog import Page
from adapters_store.errors import AdapterNotFound
from adapters_store.record import AdapterRecord, VersionState
from server.keys import KeyRecord, Scope
from server.library.library import Library

ALL_SCOPES: frozenset[Scope] = frozenset(("read", "generate", "admin"))
_CHUNK = 1000  # names looked at in one go


@dataclass(frozen=True, slots=True)
class Caller:
    name: str  # of the key; "" is somebody without one
    scopes: frozenset[Scope] = ALL_SCOPES
    adapters: tuple[str, ...] = ("*",)  # names, beginnings like "bi/*", or "*"
    may_use_base: bool = True
    tenant: str = ""  # prefix caches are shared within one tenant

    @classmethod
    def of(cls, record: KeyRecord) -> Caller:
        scopes = frozenset(record.scopes)
        return cls(record.name, scopes, record.adapters, record.base, record.tenant or record.name)

    @property
    def sees_all(self) -> bool:
        return "*" in self.adapters

    def sees(self, adapter: str) -> bool:
        """Whether an adapter of this name can exist for the caller."""
        return any(_matches(pattern, adapter) for pattern in self.adapters)

    def require(self, adapter: str) -> None:
        """Raises AdapterNotFound, in the words of the store, for a name out of scope."""
        if not self.sees(adapter):
            raise AdapterNotFound(f"there is no adapter {adapter!r}.")


ANYBODY = Caller("")  # of a server that asks for no key
STRANGER = Caller("", frozenset(), (), False)  # without a key where keys have scopes


def caller_of(request: Request) -> Caller:
    """Who the gate let in."""
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


def visible_page(
    library: Library, caller: Caller, prefix: str, limit: int, after: str = "", state: VersionState | None = None
) -> Page:
    """As `Library.page`, of what the caller sees. Costs as much as is visible, not as is registered."""
    if caller.sees_all:
        return library.page(prefix, limit, after, state)
    found: dict[str, AdapterRecord] = {}
    for pattern in caller.adapters:
        begin, is_exact = pattern.removesuffix("*"), not pattern.endswith("*")
        if not (begin.startswith(prefix) or (prefix.startswith(begin) and not is_exact)):
            continue
        records = library.page(max(begin, prefix, key=len), 1 if is_exact else limit + 1, after, state).records
        found |= {record.name: record for record in records if _matches(pattern, record.name)}
    names = sorted(found)
    return Page([found[name] for name in names[:limit]], names[limit - 1] if len(names) > limit else None)


def num_visible(library: Library, caller: Caller) -> int:
    """How many adapters the caller sees."""
    if caller.sees_all:
        return library.num_adapters
    number, after = 0, ""
    while True:
        records, next_after = visible_page(library, caller, "", _CHUNK, after)
        number += sum(bool(record.versions) for record in records)
        if next_after is None:
            return number
        after = next_after


def visible_names(caller: Caller, names: Iterable[str]) -> list[str]:
    return [name for name in names if caller.sees(name)]


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
