"""What stands on the disk about one adapter's name, and what it means: the one way in which a store is read.

version file without tombstone      committed
version file with tombstone         deleted, and somebody may still hold it
alias on committed versions         stands
alias on a number never committed   means what it meant before: the change is under way, or a crash cut it short
alias on a deleted number           means its other versions, if it has any
unreadable file                     logged; nothing that it may speak of is removed
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters_store.alias import Alias
from adapters_store.attributes import Attributes
from adapters_store.durable import read_json
from adapters_store.errors import StoreDamaged
from adapters_store.layout import Layout
from adapters_store.record import AdapterVersion

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """All files of one name, read."""

    versions: Mapping[int, AdapterVersion] = field(default_factory=dict)  # deleted ones too, ascending
    gone: frozenset[int] = frozenset()  # numbers of the tombstone
    aliases: Mapping[str, Alias] = field(default_factory=dict)  # as written
    attributes: Attributes = field(default_factory=Attributes)
    damaged: frozenset[int] = frozenset()  # numbers whose record cannot be read
    is_damaged: bool = False  # another of its files cannot be read

    @property
    def routes(self) -> dict[str, Alias]:
        """The aliases as they are to be understood."""
        meant = {alias: self.meaning_of(route) for alias, route in self.aliases.items()}
        return {alias: route for alias, route in meant.items() if route is not None}

    @property
    def last_number(self) -> int:
        return max((*self.versions, *self.gone, *self.damaged), default=0)

    def meaning_of(self, alias: Alias) -> Alias | None:
        known = self.versions.keys() | self.gone | self.damaged
        while not known >= alias.weights.keys():
            if not alias.history:
                return None
            alias = Alias(alias.history[0].weights, alias.history[1:])
        return alias.without(self.gone | self.damaged)

    def unsettled(self) -> dict[str, Alias | None]:
        """Aliases whose file says something else than is meant; None: the file is to go."""
        meant = {
            alias: self.meaning_of(route)
            for alias, route in self.aliases.items()
            if not self.damaged & route.weights.keys()  # its version may come back
        }
        return {alias: route for alias, route in meant.items() if route != self.aliases[alias]}


def read_name(layout: Layout, name: str, known: Mapping[int, AdapterVersion]) -> OnDisk:
    """Reads the files of a name; records in `known` are not read again, for they never change."""
    versions, damaged = _read_versions(layout, name, known)
    try:
        gone = layout.read_tombstone(name)
    except StoreDamaged as error:
        logger.error("%s is left out: %s", name, error)
        return OnDisk(versions, frozenset(versions), {}, Attributes(), damaged, is_damaged=True)
    aliases, num_bad = _read_aliases(layout, name)
    try:
        attributes = Attributes.from_json(read_json(layout.attributes_path(name)))
    except FileNotFoundError:
        attributes = Attributes()
    except StoreDamaged as error:
        attributes, num_bad = Attributes(), num_bad + 1
        logger.error("what is said of %s is left out: %s", name, error)
    return OnDisk(versions, gone, aliases, attributes, damaged, num_bad > 0)


def _read_aliases(layout: Layout, name: str) -> tuple[dict[str, Alias], int]:
    """(readable aliases, number of the others)."""
    aliases: dict[str, Alias] = {}
    num_bad = 0
    for alias in layout.alias_names(name):
        try:
            aliases[alias] = Alias.from_json(read_json(layout.alias_path(name, alias)))
        except FileNotFoundError:
            continue
        except StoreDamaged as error:
            num_bad += 1
            logger.error("%s@%s is left out: %s", name, alias, error)
    return aliases, num_bad


def _read_versions(
    layout: Layout, name: str, known: Mapping[int, AdapterVersion]
) -> tuple[dict[int, AdapterVersion], frozenset[int]]:
    """(readable records, numbers of the others)."""
    versions: dict[int, AdapterVersion] = {}
    damaged: set[int] = set()
    for number in sorted(layout.version_numbers(name)):
        path = layout.version_path(name, number)
        try:
            version = known.get(number) or AdapterVersion.from_json(read_json(path))
            if (version.name, version.version) != (name, number):
                raise StoreDamaged(f"{path} is the record of {version}.")
            versions[number] = version
        except FileNotFoundError:
            continue  # removed since the directory was listed
        except (StoreDamaged, OSError) as error:
            damaged.add(number)
            logger.error("%s@%d is left out: %s", name, number, error)
    return versions, frozenset(damaged)
