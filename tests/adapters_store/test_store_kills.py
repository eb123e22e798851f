"""Processes that share a store are killed at random moments; see `kill_script.py` for what must hold then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from adapters_store import fsck
from adapters_store.catalog import Catalog
from tests.adapters_store.kill_script import Truth, stage_and_commit
from tests.adapters_store.store_samples import BASE


def table(hits: dict[str, int]) -> str:
    """Operations by the call on whose side the kill fell, with sums."""
    cells: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for phase, number in hits.items():
        operation, point = phase.split(": ")
        cells[operation][point] = number
    points = sorted({point for row in cells.values() for point in row})
    lines = ["".join(f"{head:>10}" for head in ("", *points, "all"))]
    for operation, row in sorted(cells.items()):
        numbers = [row.get(point, 0) for point in points]
        lines.append(f"{operation:<10}" + "".join(f"{number:>10}" for number in (*numbers, sum(numbers))))
    return "\n".join(lines)


def kill(store: Path, num_kills: int, seed: int) -> dict[str, int]:
    """Where the kills fell."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters_store.kill_script", str(store), str(num_kills), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(f"\n{num_kills} kills, {result['answers']} answers kept, {result['versions']} versions")
    print(table(result["hits"]))
    hits: dict[str, int] = result["hits"]
    assert sum(hits.values()) == num_kills
    return hits


def test_forty_kills_lose_nothing_that_was_answered(tmp_path: Path) -> None:
    hits = kill(tmp_path / "store", 40, seed=1)
    assert len(hits) >= 4, "the kills fell on too few phases to say anything"


@pytest.mark.slow
def test_three_hundred_kills_lose_nothing_that_was_answered(tmp_path: Path) -> None:
    hits = kill(tmp_path / "store", 300, seed=1000)
    assert {phase.split(":")[0] for phase in hits} >= {"upload", "download", "alias", "delete"}


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['["commit", 5, 2]'], "2 was committed and is lost"),
        (['["delete", 1]'], "a deleted version came back"),
        (['["commit", 5, 1]'], "given twice"),
        (['["alias", "w0", 9]'], "w0 is lost"),
    ],
)
def test_a_store_that_lost_something_would_be_noticed(tmp_path: Path, lines: list[str], complaint: str) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    catalog = Catalog(store, BASE)
    truth = Truth({stage_and_commit(catalog, -1): -1})
    catalog.close()
    truth.check(store, [])
    log.write_text("\n".join(lines))
    with pytest.raises(AssertionError, match=complaint):
        truth.check(store, [log])


def test_an_upload_that_nobody_made_would_be_noticed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    catalog = Catalog(store, BASE)
    truth = Truth({stage_and_commit(catalog, -1): -1})
    stage_and_commit(catalog, 7)
    catalog.close()
    with pytest.raises(AssertionError, match="never uploaded"):
        truth.check(store, [])
    assert fsck.check(store).findings == ()
