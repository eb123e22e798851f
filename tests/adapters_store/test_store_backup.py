from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters_store import fsck
from adapters_store.alias_rules import AliasKey
from adapters_store.attributes import Attributes
from adapters_store.audit_log import AuditEntry, AuditLog
from adapters_store.backup import backup, export, restore
from adapters_store.catalog import Catalog
from adapters_store.errors import StoreDamaged, StoreUnusable, VersionNotFound
from adapters_store.names import parse_reference
from server.cli_adapters import app
from tests.adapters_store.store_samples import BASE, commit


def fill(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    commit(catalog, "org/sql", 3)
    commit(catalog, "gone", 4)
    catalog.delete("gone")
    catalog.aliases.weigh("sql", "prod", {1: 9, 2: 1})
    catalog.amend("sql", lambda _: Attributes(labels={"team": "bi"}))


def codes(found: fsck.Checkup) -> list[str]:
    return [finding.code for finding in found.findings]


def test_a_backup_taken_from_a_running_store_restores_all_of_it(catalog: Catalog, store: Path, tmp_path: Path) -> None:
    fill(catalog)
    catalog.rules.write(AliasKey("sql", "prod"), "gate", {"prompts": []})
    AuditLog(store).append(AuditEntry("me", "alias.set", "sql@prod"))
    with catalog.lease(parse_reference("sql")):
        done = backup(store, tmp_path / "store.tar")
    assert (done.num_adapters, done.num_versions) == (2, 3)
    restored = restore(tmp_path / "store.tar", tmp_path / "again")
    assert (restored.num_adapters, restored.num_versions) == (2, 3)
    again = Catalog(tmp_path / "again", BASE)
    assert again.page().records == catalog.page().records
    assert commit(again, "gone", 4).version.version == 2, "a number came back"
    assert again.rules.read(AliasKey("sql", "prod")) == {"gate": {"prompts": []}}
    assert [entry.target for entry in AuditLog(tmp_path / "again").tail(9)] == ["sql@prod"]
    again.close()
    assert fsck.check(tmp_path / "again").findings == ()
    with pytest.raises(FileExistsError):
        backup(store, tmp_path / "store.tar")


def test_a_damaged_or_foreign_archive_restores_nothing(catalog: Catalog, store: Path, tmp_path: Path) -> None:
    fill(catalog)
    archive = tmp_path / "store.tar"
    backup(store, archive)
    whole = archive.read_bytes()
    needle = (store / "blobs" / "sha256").iterdir().__next__().read_bytes()[-8:]
    position = whole.rindex(needle)
    broken = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :],
        "none": b"no tar" * 1000,
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StoreDamaged):
            restore(tmp_path / name, tmp_path / "again")
        assert not (tmp_path / "again").exists(), name
    assert not list(tmp_path.glob("*.restoring"))
    with pytest.raises(StoreUnusable, match="not empty"):
        restore(archive, store)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "versions/../../evil.json", "blobs/sha256/short", "evil"])
def test_members_that_no_backup_has_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(StoreDamaged, match="no file of a backup"):
        restore(tmp_path / "evil.tar", tmp_path / "a" / "b")
    link = tarfile.TarInfo("store.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        tar.addfile(link)
    with pytest.raises(StoreDamaged):
        restore(tmp_path / "link.tar", tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists()


def test_an_export_is_the_directory_that_was_uploaded(catalog: Catalog, store: Path, tmp_path: Path) -> None:
    fill(catalog)
    assert export(store, parse_reference("sql@1"), tmp_path / "out") == 1
    version = catalog.look_up(parse_reference("sql@1"))
    for path, blob in catalog.files_of(version).items():
        assert (tmp_path / "out" / path).read_bytes() == blob.read_bytes()
    with pytest.raises(FileExistsError):
        export(store, parse_reference("sql@1"), tmp_path / "out")
    with pytest.raises(VersionNotFound):
        export(store, parse_reference("sql@9"), tmp_path / "other")
    blob = catalog.files_of(version)["adapter_model.safetensors"]
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(StoreDamaged):
        export(store, parse_reference("sql@1"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_sound_store_has_no_findings_even_while_it_is_used(catalog: Catalog, store: Path) -> None:
    fill(catalog)
    with catalog.stage(), catalog.lease(parse_reference("sql@1")):
        catalog.delete("sql", 1, force=True)
        found = fsck.check(store)
    assert found.findings == ()
    assert (found.num_adapters, found.num_versions) == (2, 2)


def test_every_damage_is_found_and_what_can_be_is_repaired(catalog: Catalog, store: Path) -> None:
    fill(catalog)
    version = catalog.look_up(parse_reference("org/sql"))
    blob = catalog.files_of(version)["adapter_model.safetensors"]
    catalog.close()
    blob.write_bytes(bytes(blob.stat().st_size))  # same length, other bytes: only hashing tells
    (store / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"stray")
    (store / "aliases" / "sql" / "old.json").write_text(json.dumps({"weights": {"77": 1}, "history": []}))
    (store / "aliases" / "sql" / "bad.json").write_text("{")
    (store / "attributes" / "gone.json").write_text(json.dumps(Attributes(description="left").to_json()))
    (store / "attributes" / "org%2Fsql.json").write_text("[]")
    (store / "staging" / "dead-1").mkdir()
    (store / "versions" / "sql" / "1.json.abc.tmp").write_text("{")
    journal = store / "changes" / "000001"
    journal.write_text(journal.read_text() + "+sql\n")
    looked = fsck.check(store)
    expected = {
        *("blob_damaged", "blob_stray", "alias_dangling", "alias_damaged", "attributes_damaged", "leftover"),
        *("upload_dead", "change_unfinished"),
    }
    assert set(codes(looked)) == expected - {"blob_stray"}, "while records cannot be read nothing may be called unused"
    assert not any(finding.repaired for finding in looked.findings)
    assert codes(fsck.check(store)) == codes(looked), "looking changed something"
    repaired = fsck.check(store, repair=True)
    assert {finding.code for finding in repaired.findings if not finding.repaired} == {"blob_damaged"}
    assert codes(fsck.check(store)) == ["blob_missing"]
    again = Catalog(store, BASE)
    assert again.record("sql").routes["prod"].weights == {1: 9, 2: 1}
    commit(again, "org/sql", 3)
    again.close()
    assert fsck.check(store).findings == ()


def test_an_unreadable_record_is_never_repaired_away(catalog: Catalog, store: Path) -> None:
    fill(catalog)
    catalog.close()
    (store / "versions" / "sql" / "1.json").write_text("{")
    before = sorted(path.name for path in (store / "blobs" / "sha256").iterdir())
    found = fsck.check(store, repair=True)
    assert codes(found) == ["record_damaged"]
    assert not found.is_sound
    assert sorted(path.name for path in (store / "blobs" / "sha256").iterdir()) == before


def test_the_commands_end_with_codes_that_scripts_can_trust(catalog: Catalog, store: Path, tmp_path: Path) -> None:
    fill(catalog)
    run = CliRunner().invoke
    place = ["--store-dir", str(store)]
    assert "sound" in run(app, ["fsck", *place]).output
    assert run(app, ["backup", str(tmp_path / "a.tar"), *place]).exit_code == 0
    assert run(app, ["backup", str(tmp_path / "a.tar"), *place]).exit_code == 1
    assert run(app, ["restore", str(tmp_path / "a.tar"), str(tmp_path / "again")]).exit_code == 0
    assert run(app, ["export", "sql@2", str(tmp_path / "out"), *place]).exit_code == 0
    assert run(app, ["export", "sql@9", str(tmp_path / "out2"), *place]).exit_code == 1
    assert run(app, ["export", "../x", str(tmp_path / "out2"), *place]).exit_code == 2
    assert run(app, ["fsck", "--store-dir", str(tmp_path / "none")]).exit_code == 2
    shutil.rmtree(store / "blobs" / "sha256")
    os.mkdir(store / "blobs" / "sha256")
    told = run(app, ["fsck", "--json", *place])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["sound"] is False
