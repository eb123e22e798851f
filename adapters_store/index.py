"""What a store holds, in memory: names, versions, aliases, and how often each blob and effect is used.

Rebuilt from the files when the store is opened, and changed only after the files are. It knows no disk and no lock:
the catalogue brings both.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from adapters_store.errors import AdapterNotFound, AliasNotFound, VersionNotFound
from adapters_store.names import Reference
from adapters_store.record import AdapterRecord, AdapterVersion, VersionState


@dataclass(slots=True)
class Entry:
    """All that is known of one name, alive or not."""

    versions: dict[int, AdapterVersion] = field(default_factory=dict)  # visible ones, ascending
    aliases: dict[str, int] = field(default_factory=dict)  # each points to a visible version; see `set_alias`
    gone: frozenset[int] = frozenset()  # deleted numbers
    last_number: int = 0  # highest number ever given out


class Index:
    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._names: list[str] = []  # of entries with visible versions, sorted
        self._blob_uses: Counter[str] = Counter()  # includes deleted versions that are still leased
        self._effect_uses: Counter[str] = Counter()
        self._names_by_effect: dict[str, Counter[str]] = {}  # of visible versions
        self._records: dict[str, AdapterRecord] = {}  # made when asked for, dropped when the entry changes
        self._states: dict[str, VersionState] = {}  # of what each bare name means, but for those in `_changed`
        self._num_by_state: Counter[VersionState] = Counter()
        self._changed: set[str] = set()

    def entry(self, name: str) -> Entry:
        """What is known of a name; created when the name is new."""
        return self._entries.setdefault(name, Entry())

    def add(self, version: AdapterVersion) -> None:
        entry = self.entry(version.name)
        self._change(version.name)
        if not entry.versions:
            bisect.insort(self._names, version.name)
        entry.versions[version.version] = version
        entry.last_number = max(entry.last_number, version.version)
        self._blob_uses.update(file.sha256 for file in version.files)
        self._effect_uses[version.content.effect_digest] += 1
        self._names_by_effect.setdefault(version.content.effect_digest, Counter())[version.name] += 1

    def hide(self, version: AdapterVersion) -> None:
        """Takes a version out of sight, with the aliases that point to it; its bytes still count as used."""
        entry = self._entries[version.name]
        self._change(version.name)
        del entry.versions[version.version]
        self._forget_name(version)
        entry.gone |= {version.version}
        entry.aliases = {alias: number for alias, number in entry.aliases.items() if number != version.version}
        if not entry.versions:
            self._names.remove(version.name)

    def forget(self, version: AdapterVersion) -> tuple[list[str], str | None]:
        """Ends a hidden version's use of bytes: (blobs, effect) that nobody uses any more."""
        unused = []
        for sha256 in {file.sha256 for file in version.files}:
            uses = sum(file.sha256 == sha256 for file in version.files)
            self._blob_uses[sha256] -= uses
            if not self._blob_uses[sha256]:
                del self._blob_uses[sha256]
                unused.append(sha256)
        effect = version.content.effect_digest
        self._effect_uses[effect] -= 1
        if self._effect_uses[effect]:
            return unused, None
        del self._effect_uses[effect]
        return unused, effect

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points an alias to a version that is visible."""
        entry = self._entries[name]
        assert version in entry.versions, f"{name}@{version} is not committed"
        self._change(name)
        entry.aliases[alias] = version

    def set_state(self, version: AdapterVersion, state: VersionState, reason: str | None) -> None:
        versions = self._entries[version.name].versions
        self._change(version.name)
        if version.version in versions:
            versions[version.version] = replace(version, state=state, reason=reason)

    def look_up(self, reference: Reference) -> AdapterVersion:
        """Raises AdapterNotFound, AliasNotFound, VersionNotFound."""
        entry = self._entries.get(reference.name)
        if entry is None or not entry.versions:
            raise AdapterNotFound(f"there is no adapter {reference.name!r}.")
        number = reference.version
        if number is None:
            assert reference.alias is not None
            if reference.alias not in entry.aliases:
                raise AliasNotFound(
                    f"adapter {reference.name!r} has no alias {reference.alias!r}. It has {_listed(entry)}."
                )
            number = entry.aliases[reference.alias]
        if number not in entry.versions:
            raise VersionNotFound(f"adapter {reference.name!r} has no version {number}. It has {_listed(entry)}.")
        return entry.versions[number]

    def find_content(self, name: str, manifest_digest: str, base_fingerprint: str) -> AdapterVersion | None:
        """The newest version of `name` with these files, checked against this base."""
        entry = self._entries.get(name, Entry())
        for version in reversed(entry.versions.values()):
            if version.manifest_digest == manifest_digest and version.content.base_fingerprint == base_fingerprint:
                return version
        return None

    def record(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        if name not in self._records:
            entry = self._entries.get(name)
            if entry is None or not entry.versions:
                raise AdapterNotFound(f"there is no adapter {name!r}.")
            self._records[name] = AdapterRecord(name, tuple(entry.versions.values()), dict(entry.aliases))
        return self._records[name]

    def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """The first `limit` names that begin with `prefix` and sort after `after`, sorted."""
        start = max(bisect.bisect_left(self._names, prefix), bisect.bisect_right(self._names, after))
        end = bisect.bisect_left(self._names, prefix + "\U0010ffff")
        return self._names[start : min(end, start + limit)]

    def names_using(self, effects: Iterable[str]) -> set[str]:
        """Names with a visible version of one of these effects."""
        return {name for effect in effects for name in self._names_by_effect.get(effect, ())}

    @property
    def num_adapters(self) -> int:
        return len(self._names)

    def num_by_state(self) -> Counter[VersionState]:
        """Names by the state of what each bare name means. Takes time for names that changed since the last call."""
        for name in self._changed:
            before = self._states.pop(name, None)
            if before is not None:
                self._num_by_state[before] -= 1
            if self._entries[name].versions:
                state = self._states[name] = self.record(name).state
                self._num_by_state[state] += 1
        self._changed.clear()
        return +self._num_by_state

    @property
    def used_blobs(self) -> Mapping[str, int]:
        return self._blob_uses

    @property
    def used_effects(self) -> set[str]:
        return set(self._effect_uses)

    def _change(self, name: str) -> None:
        self._records.pop(name, None)
        self._changed.add(name)

    def _forget_name(self, version: AdapterVersion) -> None:
        effect = version.content.effect_digest
        names = self._names_by_effect[effect]
        names[version.name] -= 1
        if not names[version.name]:
            del names[version.name]
        if not names:
            del self._names_by_effect[effect]


def _listed(entry: Entry) -> str:
    versions = ", ".join(str(number) for number in list(entry.versions)[-8:])
    aliases = ", ".join(f"{alias} ({number})" for alias, number in sorted(entry.aliases.items())[:8])
    return f"versions {versions}" + (f" and aliases {aliases}" if aliases else " and no alias")
