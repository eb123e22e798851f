"""What a store holds, in memory: names, versions, aliases, and how often each blob and effect is used.

Name by name it takes what was read from the files; nothing else changes it but what this process finds out about a
version's use. It knows no disk and no lock: `Holdings` brings both.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from adapters_store.alias import Alias
from adapters_store.attributes import Attributes
from adapters_store.errors import AdapterNotFound, AliasNotFound, VersionNotFound
from adapters_store.names import Reference
from adapters_store.on_disk import OnDisk
from adapters_store.record import AdapterRecord, AdapterVersion, VersionState

Mark = tuple[VersionState, str | None]  # how a version can be used in this process, and why not

READY: Mark = (VersionState.READY, None)


@dataclass(slots=True)
class Entry:
    """All that is known of one name, alive or not."""

    disk: OnDisk = field(default_factory=OnDisk)
    versions: dict[int, AdapterVersion] = field(default_factory=dict)  # visible ones, ascending
    routes: dict[str, Alias] = field(default_factory=dict)  # each points to visible versions


class Index:
    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._names: list[str] = []  # of entries with visible versions, sorted
        self._blob_uses: Counter[str] = Counter()  # includes deleted versions whose record is still there
        self._effect_uses: Counter[str] = Counter()
        self._names_by_effect: dict[str, Counter[str]] = {}  # of visible versions
        self._marks: dict[tuple[str, int], Mark] = {}
        self._records: dict[str, AdapterRecord] = {}  # made when asked for, dropped when the entry changes
        self._states: dict[str, VersionState] = {}  # of what each bare name means, but for those in `_changed`
        self._num_by_state: Counter[VersionState] = Counter()
        self._changed: set[str] = set()
        self._damaged: set[str] = set()
        self._described: set[str] = set()  # names with visible versions of which anything is said
        self._draining: set[str] = set()  # names with deleted versions whose record is still there

    def disk(self, name: str) -> OnDisk:
        """What was read of a name last."""
        entry = self._entries.get(name)
        return OnDisk() if entry is None else entry.disk

    def put(self, name: str, disk: OnDisk, judge: Callable[[AdapterVersion], Mark]) -> None:
        """Takes what has been read of a name for what was known. `judge` sees what was not known to be ready."""
        before = self._entries.get(name, Entry())
        if before.disk == disk:
            return
        self._change(name)
        self._count(before, -1)
        entry = self._entries[name] = Entry(disk)
        for number, version in disk.versions.items():
            if number not in disk.gone:
                old = before.versions.get(number)
                fresh = READY if old is not None and old.state is VersionState.READY else judge(version)
                state, reason = self._marks.get((name, number), fresh)
                entry.versions[number] = replace(version, state=state, reason=reason)
        entry.routes = disk.routes
        self._count(entry, 1)
        for number in before.versions.keys() - entry.versions.keys():
            self._marks.pop((name, number), None)
        if entry.versions and not before.versions:
            bisect.insort(self._names, name)
        if before.versions and not entry.versions:
            self._names.remove(name)
        _keep(self._damaged, name, disk.is_damaged or bool(disk.damaged))
        _keep(self._described, name, bool(entry.versions) and disk.attributes != Attributes())
        _keep(self._draining, name, len(disk.versions) > len(entry.versions))
        if entry.disk == OnDisk():
            del self._entries[name]

    def clear_unlisted(self, names: Iterable[str]) -> None:
        """Forgets every name that is not among these."""
        for name in self._entries.keys() - set(names):
            self.put(name, OnDisk(), lambda version: READY)

    def set_mark(self, version: AdapterVersion, mark: Mark) -> None:
        """Sets how a version can be used, until the process ends."""
        entry = self._entries.get(version.name, Entry())
        if version.version not in entry.versions:
            return
        self._change(version.name)
        if mark == READY:
            self._marks.pop((version.name, version.version), None)
        else:
            self._marks[version.name, version.version] = mark
        plain = entry.disk.versions[version.version]
        entry.versions[version.version] = replace(plain, state=mark[0], reason=mark[1])

    def hidden(self) -> list[AdapterVersion]:
        """Deleted versions whose record and bytes are still there."""
        return [
            version
            for name in self._draining
            for number, version in self._entries[name].disk.versions.items()
            if number in self._entries[name].disk.gone
        ]

    def is_hidden(self, version: AdapterVersion) -> bool:
        disk = self.disk(version.name)
        return version.version in disk.gone and version.version in disk.versions

    def used_by_no_other(self, version: AdapterVersion) -> tuple[list[str], str | None]:
        """(blobs, effect) that would be of no use without this version."""
        own = Counter(file.sha256 for file in version.files)
        blobs = [sha256 for sha256, uses in own.items() if self._blob_uses[sha256] == uses]
        effect = version.content.effect_digest
        return blobs, effect if self._effect_uses[effect] == 1 else None

    def unsettled_names(self) -> list[str]:
        """Names of which some file says something else than is meant."""
        plain = Attributes()
        return [
            name
            for name, entry in self._entries.items()
            if entry.disk.unsettled() or (not entry.versions and entry.disk.attributes != plain)
        ]

    def attributes(self) -> dict[str, Attributes]:
        """Of adapters of which anything is said."""
        return {name: self._entries[name].disk.attributes for name in sorted(self._described)}

    def names_with_more_than(self, num_versions: int) -> list[str]:
        return [name for name in self._names if len(self._entries[name].versions) > num_versions]

    def look_up(self, reference: Reference, key: str | None = None) -> AdapterVersion:
        """See `Catalog.look_up`. Raises AdapterNotFound, AliasNotFound, VersionNotFound."""
        entry = self._entries.get(reference.name)
        if entry is None or not entry.versions:
            raise AdapterNotFound(f"there is no adapter {reference.name!r}.")
        number = reference.version
        if number is None:
            assert reference.alias is not None
            if reference.alias not in entry.routes:
                raise AliasNotFound(
                    f"adapter {reference.name!r} has no alias {reference.alias!r}. It has {_listed(entry)}."
                )
            number = entry.routes[reference.alias].choose(key, salt=reference.name)
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
            mains = {alias: route.main for alias, route in entry.routes.items()}
            self._records[name] = AdapterRecord(
                name, tuple(entry.versions.values()), mains, routes=entry.routes, attributes=entry.disk.attributes
            )
        return self._records[name]

    def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """The first `limit` names that begin with `prefix` and sort after `after`, sorted."""
        start = max(bisect.bisect_left(self._names, prefix), bisect.bisect_right(self._names, after))
        end = bisect.bisect_left(self._names, prefix + "\U0010ffff")
        return self._names[start : min(end, start + limit)]

    def names_using(self, effects: Iterable[str]) -> set[str]:
        """Names with a visible version of one of these effects."""
        return {name for effect in effects for name in self._names_by_effect.get(effect, ())}

    def users_of(self, effect: str) -> tuple[list[str], bool]:
        """Every version with this effect, deleted ones that are still held too; and whether one of them is pinned."""
        users = [str(version) for version in self.hidden() if version.content.effect_digest == effect]
        is_pinned = False
        for name in self.names_using((effect,)):
            record = self.record(name)
            mine = [version for version in record.versions if version.content.effect_digest == effect]
            users += [str(version) for version in mine]
            is_pinned = is_pinned or any(record.attributes.is_pinned(version.version) for version in mine)
        return sorted(users), is_pinned

    @property
    def num_adapters(self) -> int:
        return len(self._names)

    def num_by_state(self) -> Counter[VersionState]:
        """Names by the state of what each bare name means. Takes time for names that changed since the last call."""
        for name in self._changed:
            before = self._states.pop(name, None)
            if before is not None:
                self._num_by_state[before] -= 1
            if name in self._entries and self._entries[name].versions:
                state = self._states[name] = self.record(name).state
                self._num_by_state[state] += 1
        self._changed.clear()
        return +self._num_by_state

    @property
    def has_damage(self) -> bool:
        """Whether files of some name cannot be read: what they refer to is unknown, so nothing may be called unused."""
        return bool(self._damaged)

    @property
    def used_blobs(self) -> Mapping[str, int]:
        return self._blob_uses

    @property
    def used_effects(self) -> set[str]:
        return set(self._effect_uses)

    def _change(self, name: str) -> None:
        self._records.pop(name, None)
        self._changed.add(name)

    def _count(self, entry: Entry, sign: int) -> None:
        """Adds an entry's uses of bytes, or takes them away."""
        for version in entry.disk.versions.values():
            for file in version.files:
                _add(self._blob_uses, file.sha256, sign)
            _add(self._effect_uses, version.content.effect_digest, sign)
        for version in entry.versions.values():
            effect = version.content.effect_digest
            names = self._names_by_effect.setdefault(effect, Counter())
            _add(names, version.name, sign)
            if not names:
                del self._names_by_effect[effect]


def _keep(names: set[str], name: str, is_member: bool) -> None:
    if is_member:
        names.add(name)
    else:
        names.discard(name)


def _add(counts: Counter[str], key: str, number: int) -> None:
    counts[key] += number
    if not counts[key]:
        del counts[key]


def _listed(entry: Entry) -> str:
    versions = ", ".join(str(number) for number in list(entry.versions)[-8:])
    aliases = ", ".join(f"{alias} ({_told(route)})" for alias, route in sorted(entry.routes.items())[:8])
    return f"versions {versions}" + (f" and aliases {aliases}" if aliases else " and no alias")


def _told(alias: Alias) -> str:
    """ "3", or "3: 90, 4: 10"."""
    if len(alias.weights) == 1:
        return str(alias.main)
    return ", ".join(f"{version}: {share}" for version, share in sorted(alias.weights.items()))
