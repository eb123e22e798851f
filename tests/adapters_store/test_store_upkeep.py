from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters_store import fsck
from adapters_store.alias_rules import AliasKey
from adapters_store.attributes import Attributes
from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound, AdapterPinned, InvalidAttribute, PreconditionFailed
from adapters_store.names import parse_reference
from adapters_store.record import AdapterRecord
from tests.adapters_store.store_samples import BASE, commit

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def numbers(catalog: Catalog) -> list[int]:
    return [version.version for version in catalog.record("sql").versions]


def expire_at(catalog: Catalog, name: str, moment: datetime | None) -> None:
    text = None if moment is None else moment.isoformat()
    catalog.amend(name, lambda said: replace(said, expires_at=text))


def test_what_is_said_of_an_adapter_is_kept_and_dies_with_it(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    said = Attributes({"team": "bi"}, "asks for SQL", True, frozenset({1}), NOW.isoformat(), 3)
    before = catalog.record("sql").etag
    assert catalog.amend("sql", lambda _: said).attributes == said
    assert catalog.record("sql").etag != before
    catalog.close()
    again = Catalog(store, BASE)
    assert again.record("sql").attributes == said
    with pytest.raises(AdapterPinned, match="sql@1 is pinned"):
        again.delete("sql")
    again.delete("sql", force=True)
    commit(again, "sql", 1)
    assert again.record("sql").attributes == Attributes()
    with pytest.raises(AdapterNotFound):
        again.amend("nope", lambda _: said)
    again.close()


@pytest.mark.parametrize(
    "said",
    [
        Attributes({"": "x"}),
        Attributes({"a b": "x"}),
        Attributes({"a": "line\nbreak"}),
        Attributes({"a": "x" * 257}),
        Attributes({f"k{number}": "" for number in range(65)}),
        Attributes(description="x" * 5000),
        Attributes(keep_versions=0),
        Attributes(expires_at="tomorrow"),
        Attributes(expires_at="2030-01-01T00:00:00"),
    ],
)
def test_attributes_outside_the_rules_are_refused(catalog: Catalog, said: Attributes) -> None:
    commit(catalog, "sql", 1)
    with pytest.raises(InvalidAttribute):
        catalog.amend("sql", lambda _: said)
    assert catalog.record("sql").attributes == Attributes()


def test_the_newest_versions_are_kept_and_those_that_something_points_to(store: Path) -> None:
    catalog = Catalog(store, BASE, keep_versions=2)
    commit(catalog, "sql", 1)
    catalog.aliases.set("sql", "prod", 1)
    commit(catalog, "sql", 2)
    catalog.amend("sql", lambda said: replace(said, pinned_versions=frozenset({2})))
    for fill in range(3, 7):
        commit(catalog, "sql", fill)
    assert numbers(catalog) == [1, 2, 5, 6]
    catalog.amend("sql", lambda said: replace(said, keep_versions=1, pinned_versions=frozenset()))
    catalog.upkeep.tend()
    assert numbers(catalog) == [1, 6]
    catalog.close()


def test_without_retention_everything_stays(catalog: Catalog) -> None:
    for fill in range(5):
        commit(catalog, "sql", fill)
    catalog.upkeep.tend()
    assert numbers(catalog) == [1, 2, 3, 4, 5]
    catalog.amend("sql", lambda said: replace(said, pinned=True, keep_versions=1))
    catalog.upkeep.tend()
    assert numbers(catalog) == [1, 2, 3, 4, 5]


def test_retention_does_not_take_bytes_from_those_who_use_them(store: Path) -> None:
    catalog = Catalog(store, BASE, keep_versions=1)
    commit(catalog, "sql", 1)
    with catalog.lease(parse_reference("sql")) as lease:
        commit(catalog, "sql", 2)
        assert numbers(catalog) == [2]
        paths = catalog.files_of(lease.version)
        assert all(path.exists() for path in paths.values())
    assert not paths["adapter_model.safetensors"].exists()
    catalog.close()


def test_an_adapter_goes_when_its_time_has_come(catalog: Catalog) -> None:
    for name in ("early", "late", "pinned", "plain"):
        commit(catalog, name, 1)
    expire_at(catalog, "early", NOW - timedelta(seconds=1))
    expire_at(catalog, "late", NOW + timedelta(seconds=1))
    expire_at(catalog, "pinned", NOW - timedelta(seconds=1))
    catalog.amend("pinned", lambda said: replace(said, pinned=True))
    catalog.amend("plain", lambda said: replace(said, expires_at=NOW.isoformat(), pinned_versions=frozenset({1})))
    assert [version.name for version in catalog.upkeep.expire(NOW)] == ["early"]
    assert [record.name for record in catalog.page().records] == ["late", "pinned", "plain"]
    expire_at(catalog, "late", None)
    assert catalog.upkeep.expire(NOW + timedelta(days=9999)) == []


def test_the_time_of_a_deleted_adapter_does_not_come_for_its_successor(catalog: Catalog, store: Path) -> None:
    """As if a process had died between a deletion's tombstone and the removal of what was said of the adapter."""
    commit(catalog, "sql", 1)
    expire_at(catalog, "sql", NOW)
    left = (store / "attributes" / "sql.json").read_bytes()
    catalog.delete("sql")
    catalog.close()
    (store / "attributes" / "sql.json").write_bytes(left)
    again = Catalog(store, BASE)
    commit(again, "sql", 2)
    assert again.upkeep.expire(NOW + timedelta(days=1)) == []
    again.close()


def test_stray_files_and_dead_uploads_are_swept_and_live_ones_are_not(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    stray = store / "blobs" / "sha256" / ("0" * 64)
    stray.write_bytes(b"12345")
    (store / "staging" / "dead-1").mkdir()
    (store / "versions" / "sql" / "9.json.tmp").write_text("{")
    catalog.rules.write(AliasKey("sql", "prod"), "gate", {"prompts": []})
    (store / "rules" / "sql" / "prod.json.1.tmp").write_text("{")
    (store / "rules" / "gone").mkdir()
    (store / "rules" / "gone" / "prod.json").write_text("{}")
    for folder in ("warm", "answers"):
        (store / folder).mkdir()
        (store / folder / "old.json.1.tmp").write_text("{")
        os.utime(store / folder / "old.json.1.tmp", (0, 0))
        (store / folder / "new.json.1.tmp").write_text("{")
    assert [finding.code for finding in fsck.check(store).findings].count("leftover") == 5
    stage = catalog.stage()
    stage.add_file("adapter_config.json", [b"{}"])
    done = catalog.upkeep.tend()
    assert (done.versions, done.held, done.freed_bytes, done.stages) == (0, 0, 5, 1)
    assert not stray.exists()
    assert sorted(path.name for path in store.rglob("*.tmp")) == ["new.json.1.tmp"] * 2, "these may still be written"
    assert sorted(path.name for path in (store / "rules").iterdir()) == ["sql"]
    assert catalog.rules.read(AliasKey("sql", "prod")) == {"gate": {"prompts": []}}
    assert stage.path_of("adapter_config.json").exists()
    stage.close()
    assert catalog.upkeep.tend() == (0, 0, 0, 0)


def test_a_deletion_takes_the_rules_of_its_adapter_with_it(catalog: Catalog, store: Path) -> None:
    key = AliasKey("sql", "prod")
    with pytest.raises(AdapterNotFound):
        catalog.rules.write(key, "gate", {})
    for fill in (1, 2):
        commit(catalog, "sql", fill)
    catalog.rules.write(key, "gate", {"prompts": []})
    catalog.delete("sql", 1)
    assert catalog.rules.read(key) == {"gate": {"prompts": []}}, "the control: one version is not the adapter"
    catalog.delete("sql")
    commit(catalog, "sql", 3)
    assert catalog.rules.read(key) == {}


def test_a_rule_is_written_on_a_condition(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    seen: list[str] = []

    def forbid(record: AdapterRecord | None) -> None:
        assert record is not None
        seen.append(record.name)
        raise PreconditionFailed("no")

    with pytest.raises(PreconditionFailed):
        catalog.rules.write(AliasKey("sql", "prod"), "gate", {}, expect=forbid)
    assert (seen, catalog.rules.read(AliasKey("sql", "prod"))) == (["sql"], {})


def test_what_a_process_deletes_by_itself_is_told(store: Path) -> None:
    catalog = Catalog(store, BASE, keep_versions=1)
    told: list[tuple[str, list[str]]] = []
    catalog.upkeep.on_removed = lambda reason, gone: told.append((reason, [str(version) for version in gone]))
    for fill in (1, 2):
        commit(catalog, "sql", fill)
    expire_at(catalog, "sql", NOW)
    catalog.upkeep.expire(NOW)
    assert told == [("retention", ["sql@1"]), ("time to live", ["sql@2"])]
    catalog.close()
