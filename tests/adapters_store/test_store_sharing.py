"""Two catalogues on one directory, as two processes have: locks are kept between open files, so one process will do."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store import holdings, journal, on_disk
from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound, StoreBusy, VersionNotFound
from adapters_store.images import StagedImage
from adapters_store.locks import CHANGE, StoreLocks
from adapters_store.names import parse_reference
from adapters_store.record import VersionState
from tests.adapters_store.store_samples import BASE, commit


@pytest.fixture
def other(catalog: Catalog, store: Path) -> Iterator[Catalog]:
    """Opened after `catalog`, and before anything is committed."""
    other = Catalog(store, BASE)
    yield other
    other.close()


def number_of(catalog: Catalog, reference: str) -> int:
    return catalog.look_up(parse_reference(reference)).version


def test_each_sees_at_once_what_the_other_did(catalog: Catalog, other: Catalog) -> None:
    commit(catalog, "sql", 1)
    assert number_of(other, "sql") == 1
    commit(other, "sql", 2)
    assert number_of(catalog, "sql") == 2
    catalog.aliases.weigh("sql", "prod", {1: 90, 2: 10})
    assert other.record("sql").routes["prod"].weights == {1: 90, 2: 10}
    catalog.delete("sql")
    assert other.num_adapters == 0
    with pytest.raises(AdapterNotFound):
        other.look_up(parse_reference("sql"))
    assert commit(other, "sql", 1).version.version == 3


def test_looking_costs_one_stat_while_nothing_changes(
    catalog: Catalog, other: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(catalog, "sql", 1)
    number_of(other, "sql")
    monkeypatch.setattr(on_disk, "read_json", None)  # reading any file would fail
    assert number_of(other, "sql") == 1
    assert number_of(catalog, "sql") == 1


def test_no_number_is_lost_or_given_twice(catalog: Catalog, other: Catalog) -> None:
    def work(mine: Catalog, start: int) -> None:
        for fill in range(start, start + 12):
            commit(mine, "sql", fill)

    threads = [threading.Thread(target=work, args=item) for item in ((catalog, 0), (other, 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.version for version in catalog.record("sql").versions] == list(range(1, 25))
    assert catalog.record("sql") == other.record("sql")


def test_where_locks_do_not_reach_a_number_is_still_given_once(
    catalog: Catalog, other: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another host, whose locks are not seen, committed between our look and our link."""
    commit(catalog, "sql", 1)
    real = catalog._pen.write_aliases
    calls = 0

    def write_aliases(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path = catalog._layout.version_path("sql", 2)
            record = json.loads(catalog._layout.version_path("sql", 1).read_bytes())
            path.write_text(json.dumps({**record, "version": 2}))
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog._pen, "write_aliases", write_aliases)
    assert commit(catalog, "sql", 5).version.version == 3
    assert number_of(catalog, "sql") == 3
    assert number_of(catalog, "sql@2") == 2


def test_what_another_holds_stays_until_it_lets_go(catalog: Catalog, other: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    lease = other.lease(parse_reference("sql"))
    catalog.delete("sql")
    paths = other.files_of(lease.version)
    with pytest.raises(AdapterNotFound):
        other.lease(parse_reference("sql"))
    assert catalog.upkeep.collect().held == 1
    assert all(path.exists() for path in paths.values())
    lease.release()  # the holder frees what it held last
    assert not any(path.exists() for path in paths.values())
    assert not list((store / "versions" / "sql").iterdir())


def test_what_a_dead_process_held_is_freed_by_the_next_upkeep(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    script = f"""
import os, pathlib
from adapters_store.catalog import Catalog
from adapters_store.names import parse_reference
catalog = Catalog(pathlib.Path({str(store)!r}), {BASE!r})
lease = catalog.lease(parse_reference("sql"))
catalog.stage()
print("holds", flush=True)
input()
os._exit(9)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    catalog.delete("sql")
    held = catalog.upkeep.collect()
    assert (held.versions, held.held, held.stages) == (0, 1, 0)
    holder.communicate("\n")
    freed = catalog.upkeep.tend()
    assert (freed.versions, freed.held, freed.stages) == (1, 0, 1)
    assert freed.freed_bytes > 0
    assert not list((store / "blobs" / "sha256").iterdir())
    assert not list((store / "staging").iterdir())


def test_a_version_that_is_being_removed_cannot_be_leased(catalog: Catalog, other: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    locks = StoreLocks(store / "locks")
    with locks.tried("sql@1") as is_free:
        assert is_free
        with pytest.raises(VersionNotFound, match="just been deleted"):
            other.lease(parse_reference("sql"))
    other.lease(parse_reference("sql")).release()
    (store / "versions" / "sql" / "1.json").unlink()
    with pytest.raises(VersionNotFound):
        other.lease(parse_reference("sql"))
    assert other.leases.total() == 0
    locks.close()


def test_a_lease_at_once_never_waits(catalog: Catalog, other: Catalog) -> None:
    commit(catalog, "sql", 1)
    reference = parse_reference("sql")
    assert other.lease_at_once(reference) is None, "there is something to read"
    other.lease(reference).release()
    lease = other.lease_at_once(reference)
    assert lease is not None
    assert lease.version.version == 1
    lease.release()
    with other._holdings.reading():
        assert other.lease_at_once(reference) is None, "another thread is at it"
    commit(other, "sql", 2)
    mine = other.lease_at_once(reference)
    assert mine is not None, "its own changes are read already"
    assert mine.version.version == 2
    mine.release()
    with pytest.raises(AdapterNotFound):
        other.lease_at_once(parse_reference("nobody"))


def test_a_store_that_stays_locked_is_said_to_be_busy(
    catalog: Catalog, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.holdings._CHANGE_TIMEOUT_S", 0.05)
    locks = StoreLocks(store / "locks")
    with locks.alone(CHANGE, 0), pytest.raises(StoreBusy, match="Try again"):
        commit(catalog, "sql", 1)
    locks.close()
    commit(catalog, "sql", 1)


def test_an_image_that_another_packed_is_found(catalog: Catalog, other: Catalog, store: Path) -> None:
    version = commit(catalog, "sql", 1).version
    path = other.stage().directory / "image"
    path.write_bytes(b"image")
    other.keep_image(version, StagedImage(path, "f32", 5))
    assert catalog.find_image(version, "f32") == other.find_image(version, "f32")
    assert catalog.find_image(version, "f32") is not None
    catalog.upkeep.collect()
    assert other.find_image(version, "f32") is not None
    catalog.delete("sql")
    assert list((store / "images").iterdir()) == []


def test_processes_with_other_bases_share_a_store(catalog: Catalog, store: Path) -> None:
    stranger = Catalog(store, "sha256:base-two")
    commit(catalog, "sql", 1)
    assert stranger.look_up(parse_reference("sql")).state is VersionState.INCOMPATIBLE
    commit(stranger, "sql", 1, aliases=())
    assert catalog.look_up(parse_reference("sql@2")).state is VersionState.INCOMPATIBLE
    assert stranger.look_up(parse_reference("sql@2")).state is VersionState.READY
    stranger.close()


def test_who_fell_behind_reads_everything_again(
    catalog: Catalog, other: Catalog, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setattr(journal, "_MAX_SEGMENT_BYTES", 20)
    for fill in range(9):
        commit(catalog, f"name-{fill}", fill)
    catalog.delete("name-3")
    assert len(list((store / "changes").iterdir())) <= 2
    assert [record.name for record in other.page().records] == [f"name-{fill}" for fill in range(9) if fill != 3]
    commit(other, "name-3", 1)
    assert catalog.num_adapters == 9
    assert number_of(catalog, "name-3") == 2


def test_what_could_not_be_read_is_read_at_the_next_look(
    catalog: Catalog, other: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    commit(catalog, "sql", 1)
    assert number_of(other, "sql") == 1
    commit(catalog, "sql", 2)
    with monkeypatch.context() as patch:
        patch.setattr(holdings, "read_name", fail)
        assert number_of(other, "sql") == 1
    assert "cannot be read" in caplog.text
    assert number_of(other, "sql") == 2


def test_a_change_that_was_cut_short_is_settled_by_the_next(catalog: Catalog, other: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    with catalog._holdings.changing("sql") as disk:
        catalog._holdings._journal.begin("sql")  # ... and the process dies after it wrote the alias
        catalog._pen.write_aliases("sql", ["default"], 2, disk.aliases)
    assert json.loads((store / "aliases" / "sql" / "default.json").read_bytes())["weights"] == {"2": 1}
    assert number_of(other, "sql") == 1
    commit(other, "bystander", 1)
    assert json.loads((store / "aliases" / "sql" / "default.json").read_bytes())["weights"] == {"1": 1}
    assert commit(other, "sql", 7, aliases=("prod",)).version.version == 2
    assert number_of(other, "sql") == 1, "an alias moved to a number that another upload got"
