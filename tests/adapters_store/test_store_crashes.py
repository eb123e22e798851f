"""A process is killed at every point where it changes the disk; the store must then hold one of two states, whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import DiskFull
from adapters_store.names import parse_reference
from tests.adapters_store import crash_script
from tests.adapters_store.store_samples import BASE, commit

State = dict[str, Any]


def prepare(store: Path) -> None:
    catalog = Catalog(store, BASE)
    for _ in range(5):  # numbers 1 to 5 are used up, so no number is right by chance
        commit(catalog, "sql", 0)
        catalog.delete("sql")
    commit(catalog, "sql", 1)
    commit(catalog, "sql", 3, aliases=("canary",))
    catalog.aliases.set("sql", "canary", 6)
    commit(catalog, "bystander", 4)
    catalog.close()


def state_of(store: Path) -> State:
    """Everything that a user can see, and that nothing unseen is left."""
    catalog = Catalog(store, BASE)
    records = catalog.page().records
    used = set()
    for record in records:
        for version in record.versions:
            assert version.state == "ready"
            for path in catalog.files_of(version).values():
                assert path.exists()
                used.add(path.name)
    assert {path.name for path in (store / "blobs" / "sha256").iterdir()} == used
    assert list((store / "staging").iterdir()) == []
    assert not list(store.rglob("*.tmp"))
    state = {
        record.name: (
            [version.version for version in record.versions],
            {alias: route.weights for alias, route in record.routes.items()},
            record.attributes,
        )
        for record in records
    }
    catalog.close()
    return state


class Run(NamedTuple):
    exit_status: int
    changes: tuple[str, ...]  # none where it died


def run(scenario: str, jobs: list[tuple[Path, int, str]]) -> list[Run]:
    """Runs a scenario once on each of several stores, each in a process that dies at (point, BEFORE or AFTER)."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.adapters_store.crash_script", scenario),
            *(f"{store}:{point}:{side}" for store, point, side in jobs),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [Run(int(status), () if told == "-" else tuple(told.split(","))) for status, told in lines]


@pytest.mark.parametrize("scenario", sorted(crash_script.SCENARIOS))
def test_a_crash_anywhere_leaves_the_state_before_or_after(tmp_path: Path, scenario: str) -> None:
    origin = tmp_path / "origin"
    prepare(origin)
    before = state_of(origin)
    done = tmp_path / "done"
    shutil.copytree(origin, done)
    (alive,) = run(scenario, [(done, 0, "BEFORE")])
    assert alive.exit_status == 0
    after = state_of(done)
    assert after != before
    jobs = [
        (tmp_path / f"{point}-{side}", point, side)
        for point in range(1, len(alive.changes) + 1)
        for side in ("BEFORE", "AFTER")
    ]
    for store, _, _ in jobs:
        shutil.copytree(origin, store)
    assert {killed.exit_status for killed in run(scenario, jobs)} == {9}
    seen = []
    for store, point, side in jobs:
        state = state_of(store)
        assert state in (before, after), f"killed {side} change {point}"
        assert state_of(store) == state  # opening settled it
        seen.append(state)
    assert before in seen
    assert after in seen
    first_after = seen.index(after)
    print(f"\n{scenario}: {len(jobs)} kills, the change counts from the {first_after + 1}. on;", end=" ")
    print(", ".join(f"{number} x {name}" for name, number in Counter(alive.changes).items()))
    assert all(state == after for state in seen[first_after:]), "a committed change came undone"


def test_what_is_renamed_was_synced_first_and_its_directory_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    catalog = Catalog(store, BASE)
    events: list[tuple[str, str]] = []
    real_fsync, real_replace, real_link = os.fsync, os.replace, os.link

    def fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("rename", f"{source}>{target}"))
        real_replace(source, target)

    def link(source: Path, target: Path) -> None:
        events.append(("rename", f"{source}>{target}"))
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", link)
    commit(catalog, "sql", 1)
    catalog.delete("sql")
    catalog.close()
    renames = [(number, text.split(">")) for number, (kind, text) in enumerate(events) if kind == "rename"]
    assert len(renames) >= 5  # two blobs, an alias, a version, a tombstone
    for number, (source, target) in renames:
        assert ("sync", source) in events[:number]
        assert events[number + 1] == ("sync", str(Path(target).parent))
    assert f"{store}/versions/sql/1.json" in [target for _, (_, target) in renames][-2]  # the commit itself comes last


@pytest.mark.parametrize("fatal_call", range(1, 40))
def test_a_full_disk_anywhere_in_a_commit_changes_nothing_that_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal_call: int
) -> None:
    store = tmp_path / "store"
    catalog = Catalog(store, BASE)
    commit(catalog, "sql", 1)
    num_calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == fatal_call:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "link", "fsync", "write", "mkdir"):
            patch.setattr(os, name, failing(getattr(os, name)))
        try:
            commit(catalog, "sql", 2)
            failed = False
        except DiskFull:
            failed = True
    assert failed or fatal_call >= num_calls, "only the notice that ends a change may be lost"
    if failed:
        assert catalog.look_up(parse_reference("sql")).version == 1
        commit(catalog, "sql", 3, aliases=())
        assert catalog.look_up(parse_reference("sql")).version == 1
    seen = catalog.look_up(parse_reference("sql")).version
    catalog.close()
    again = Catalog(store, BASE)
    assert again.look_up(parse_reference("sql")).version == seen
    again.close()


def test_a_killed_process_lets_go_of_the_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(store)
    assert run("upload", [(store, 1, "BEFORE")]) == [Run(9, ())]
    Catalog(store, BASE).close()
