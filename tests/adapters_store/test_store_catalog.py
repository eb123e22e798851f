from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import (
    AdapterExists,
    AdapterNotFound,
    AliasInUse,
    AliasNotFound,
    InvalidName,
    StoreBusy,
    StoreDamaged,
    VersionNotFound,
)
from adapters_store.images import StagedImage
from adapters_store.names import parse_reference
from adapters_store.record import AdapterVersion, VersionState
from tests.adapters_store.store_samples import BASE, commit


def number_of(catalog: Catalog, reference: str) -> int:
    return catalog.look_up(parse_reference(reference)).version


def blobs(store: Path) -> set[str]:
    return {path.name for path in (store / "blobs" / "sha256").iterdir()}


def test_a_commit_makes_numbered_versions_and_moves_the_default(catalog: Catalog) -> None:
    first, second = commit(catalog, "sql", 1), commit(catalog, "sql", 2)
    assert [str(first.version), str(second.version)] == ["sql@1", "sql@2"]
    assert number_of(catalog, "sql") == 2
    assert number_of(catalog, "sql@1") == 1


def test_known_content_makes_no_version_and_moves_the_default(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    again = commit(catalog, "sql", 1)
    assert (again.version.version, again.created) == (1, False)
    assert number_of(catalog, "sql") == 1
    assert len(catalog.record("sql").versions) == 2


def test_a_commit_without_promotion_moves_nothing(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2, aliases=())
    assert number_of(catalog, "sql") == 1
    commit(catalog, "sql", 2, aliases=("canary",))
    assert number_of(catalog, "sql@canary") == 2
    assert number_of(catalog, "sql") == 1


def test_equal_files_are_stored_once(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    before = blobs(store)
    commit(catalog, "org/other", 1)
    assert blobs(store) == before
    catalog.delete("sql")
    assert blobs(store) == before
    catalog.delete("org/other")
    assert blobs(store) == set()


def test_everything_is_there_after_a_reopening(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2, aliases=("canary",))
    commit(catalog, "org/sql", 3)
    before = catalog.page().records
    catalog.close()
    again = Catalog(store, BASE)
    assert again.page().records == before
    assert again.files_of(before[1].versions[0])["adapter_config.json"].read_bytes().startswith(b"{")
    again.close()


def test_references_to_what_is_not_there_are_told_apart(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    with pytest.raises(AdapterNotFound, match="'nope'"):
        catalog.look_up(parse_reference("nope"))
    with pytest.raises(VersionNotFound, match="versions 1"):
        catalog.look_up(parse_reference("sql@7"))
    with pytest.raises(AliasNotFound, match=r"default \(1\)"):
        catalog.look_up(parse_reference("sql@prod"))


def test_names_and_aliases_are_checked_before_anything_is_written(catalog: Catalog, store: Path) -> None:
    with pytest.raises(InvalidName):
        commit(catalog, "../sql", 1)
    with pytest.raises(InvalidName):
        commit(catalog, "sql", 1, aliases=("latest",))
    assert list((store / "versions").iterdir()) == []
    assert blobs(store) == set()


def test_create_only_refuses_a_name_that_is_taken(catalog: Catalog) -> None:
    commit(catalog, "sql", 1, create_only=True)
    with pytest.raises(AdapterExists):
        commit(catalog, "sql", 2, create_only=True)
    commit(catalog, "sq", 2, create_only=True)


def test_an_alias_moves_to_committed_versions_only(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    catalog.aliases.set("sql", "prod", 1)
    catalog.aliases.set("sql", "prod", 2)
    with pytest.raises(VersionNotFound):
        catalog.aliases.set("sql", "prod", 3)
    catalog.close()
    again = Catalog(store, BASE)
    assert number_of(again, "sql@prod") == 2
    again.close()


def test_pages_are_sorted_and_complete(catalog: Catalog) -> None:
    names = ["b", "a", "org/a", "org/b", "aa"]
    for name in names:
        commit(catalog, name)
    seen: list[str] = []
    after = ""
    while True:
        page = catalog.page(limit=2, after=after)
        seen += [record.name for record in page.records]
        if page.next_after is None:
            break
        after = page.next_after
    assert seen == sorted(names)
    assert [record.name for record in catalog.page(prefix="org/").records] == ["org/a", "org/b"]
    assert [record.name for record in catalog.page(prefix="org/", after="org/a").records] == ["org/b"]
    assert catalog.page(prefix="zzz").records == []
    assert catalog.num_adapters == 5


def test_states_and_users_of_an_effect_are_counted_as_names_come_and_go(catalog: Catalog) -> None:
    assert catalog.num_by_state() == {}
    first = commit(catalog, "sql", 1).version
    commit(catalog, "copy", 1)
    second = commit(catalog, "sql", 2).version
    effect = first.content.effect_digest
    assert catalog.num_by_state() == {VersionState.READY: 2}
    assert catalog.names_using([effect]) == ["copy", "sql"]
    assert catalog.names_using([second.content.effect_digest, "sha256:nobody"]) == ["sql"]
    catalog.mark(second, VersionState.FAILED, "damaged")
    assert catalog.num_by_state() == {VersionState.READY: 1, VersionState.FAILED: 1}
    catalog.aliases.set("sql", "default", 1)
    assert catalog.num_by_state() == {VersionState.READY: 2}
    catalog.delete("sql")
    assert catalog.num_by_state() == {VersionState.READY: 1}
    assert catalog.names_using([effect]) == ["copy"]


def test_a_deleted_version_is_gone_and_its_number_never_comes_back(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    catalog.delete("sql", 1)
    with pytest.raises(VersionNotFound):
        catalog.look_up(parse_reference("sql@1"))
    catalog.delete("sql")
    with pytest.raises(AdapterNotFound):
        catalog.record("sql")
    catalog.close()
    again = Catalog(store, BASE)
    assert again.num_adapters == 0
    assert commit(again, "sql", 1).version.version == 3
    assert number_of(again, "sql") == 3
    again.close()


def test_a_version_that_an_alias_points_to_is_deleted_by_force_only(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 2)
    with pytest.raises(AliasInUse, match="'default'"):
        catalog.delete("sql", 2)
    catalog.delete("sql", 2, force=True)
    with pytest.raises(AliasNotFound):
        catalog.look_up(parse_reference("sql"))
    catalog.aliases.set("sql", "default", 1)
    catalog.delete("sql", 1)  # the last one: nothing is left that the alias could move to
    assert catalog.num_adapters == 0


def test_a_deleted_version_keeps_its_bytes_until_the_last_lease_ends(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    one, two = catalog.lease(parse_reference("sql")), catalog.lease(parse_reference("sql@1"))
    catalog.delete("sql")
    with pytest.raises(AdapterNotFound):
        catalog.lease(parse_reference("sql"))
    paths = catalog.files_of(one.version)
    one.release()
    one.release()  # again is harmless: it must not end the other lease
    assert all(path.exists() for path in paths.values())
    two.release()
    assert not any(path.exists() for path in paths.values())
    assert blobs(store) == set()
    assert catalog.leases.total() == 0


def test_a_name_uploaded_again_while_its_old_version_drains_is_another_version(catalog: Catalog) -> None:
    commit(catalog, "sql", 1)
    with catalog.lease(parse_reference("sql")) as old:
        catalog.delete("sql")
        fresh = commit(catalog, "sql", 1)
        assert fresh.version.version == 2
        assert old.version.version == 1
        paths = catalog.files_of(old.version)
    assert all(path.exists() for path in paths.values())  # the new version has the same bytes


def test_bytes_are_reclaimed_where_the_owner_says(store: Path) -> None:
    jobs: list[object] = []
    catalog = Catalog(store, BASE, reclaim=jobs.append)
    commit(catalog, "sql", 1)
    catalog.delete("sql")
    assert blobs(store) != set()
    jobs[0]()  # type: ignore[operator]
    assert blobs(store) == set()
    catalog.close()


def test_another_base_sees_versions_as_incompatible_and_deletes_nothing(catalog: Catalog, store: Path) -> None:
    commit(catalog, "sql", 1)
    catalog.close()
    other = Catalog(store, "sha256:base-two")
    version = other.look_up(parse_reference("sql"))
    assert version.state is VersionState.INCOMPATIBLE
    assert version.reason is not None
    assert "Upload it again" in version.reason
    checked = commit(other, "sql", 1)  # the same files, checked against the new base, are a new version
    assert (checked.version.version, checked.created, checked.version.state) == (2, True, VersionState.READY)
    other.close()
    back = Catalog(store, BASE)
    assert back.look_up(parse_reference("sql@1")).state is VersionState.READY
    assert back.look_up(parse_reference("sql@2")).state is VersionState.INCOMPATIBLE
    back.close()


def test_lost_bytes_are_found_at_opening_and_healed_by_an_upload(catalog: Catalog, store: Path) -> None:
    version = commit(catalog, "sql", 1).version
    paths = catalog.files_of(version)
    catalog.close()
    paths["adapter_model.safetensors"].write_bytes(b"short")
    again = Catalog(store, BASE)
    assert again.look_up(parse_reference("sql")).state is VersionState.FAILED
    healed = commit(again, "sql", 1)
    assert (healed.version.version, healed.created, healed.version.state) == (1, False, VersionState.READY)
    assert paths["adapter_model.safetensors"].stat().st_size > 5
    again.close()


def test_an_unreadable_record_is_left_out_and_nothing_is_swept(
    catalog: Catalog, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(catalog, "sql", 1)
    commit(catalog, "good", 2)
    before = blobs(store)
    catalog.close()
    (store / "versions" / "sql" / "1.json").write_text("{")
    again = Catalog(store, BASE)
    assert [record.name for record in again.page().records] == ["good"]
    assert "sql@1 is left out" in caplog.text
    assert blobs(store) == before
    assert commit(again, "sql", 3).version.version == 2  # its number is taken all the same
    again.close()


def test_a_release_that_does_not_share_and_this_one_keep_each_other_out(catalog: Catalog, store: Path) -> None:
    with (store / "lock").open("rb") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        catalog.close()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(StoreBusy, match="open in another process"):
            Catalog(store, BASE)
    Catalog(store, BASE).close()


def test_a_version_reads_back_as_it_was_written(catalog: Catalog) -> None:
    version = commit(catalog, "org/sql", 1).version
    assert AdapterVersion.from_json(version.to_json()) == version
    with pytest.raises(StoreDamaged, match="lacks"):
        AdapterVersion.from_json({"schema": 1})


def test_an_image_lives_as_long_as_its_effect(catalog: Catalog, store: Path) -> None:
    def staged(name: str) -> StagedImage:
        path = store / "staging" / name
        path.write_bytes(b"image")
        return StagedImage(path, "f32-p1", 4)

    version = commit(catalog, "sql", 1, image=staged("a")).version
    commit(catalog, "twin", 1, image=staged("b"))
    found = catalog.find_image(version, "f32-p1")
    assert found is not None
    assert (found.num_bytes, found.path.read_bytes()) == (4, b"image")
    assert catalog.find_image(version, "bf16-p1") is None
    assert list((store / "staging").iterdir()) == []
    catalog.delete("sql")
    assert found.path.exists()  # the twin has the same effect
    catalog.close()
    again = Catalog(store, BASE)
    assert again.find_image(version, "f32-p1") == found
    again.delete("twin")
    assert list((store / "images").iterdir()) == []
    again.close()


def test_a_cut_or_stray_image_is_forgotten_at_opening(catalog: Catalog, store: Path) -> None:
    path = store / "staging" / "a"
    path.write_bytes(b"image")
    version = commit(catalog, "sql", 1, image=StagedImage(path, "f32", 4)).version
    found = catalog.find_image(version, "f32")
    assert found is not None
    catalog.close()
    found.path.write_bytes(b"im")
    (store / "images" / "stray.partial").write_bytes(b"x")
    again = Catalog(store, BASE)
    assert again.find_image(version, "f32") is None
    assert list((store / "images").iterdir()) == []
    again.close()


def test_many_threads_commit_without_losing_a_version(catalog: Catalog) -> None:
    def work(fill: int) -> None:
        commit(catalog, "sql", fill)
        commit(catalog, f"own-{fill}", fill)

    threads = [threading.Thread(target=work, args=(fill,)) for fill in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.version for version in catalog.record("sql").versions] == [1, 2, 3, 4, 5, 6]
    assert catalog.num_adapters == 7
