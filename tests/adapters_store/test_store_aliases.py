from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from adapters_store.alias import MAX_HISTORY, Alias
from adapters_store.catalog import Catalog
from adapters_store.errors import (
    AdapterNotFound,
    AliasInUse,
    AliasNotFound,
    InvalidName,
    InvalidWeights,
    NothingToRollBack,
    PreconditionFailed,
    StoreDamaged,
    VersionNotFound,
)
from adapters_store.names import parse_reference
from adapters_store.record import AdapterRecord
from tests.adapters_store.store_samples import BASE, commit

PROD = parse_reference("sql@prod")


@pytest.fixture
def three(catalog: Catalog) -> Catalog:
    for fill in range(1, 4):
        commit(catalog, "sql", fill)
    return catalog


def test_a_key_gets_the_same_version_each_time_and_shares_come_out_as_asked(three: Catalog) -> None:
    three.aliases.weigh("sql", "prod", {2: 90, 3: 10})
    chosen = {f"user-{number}": three.look_up(PROD, f"user-{number}").version for number in range(2000)}
    assert all(three.look_up(PROD, key).version == version for key, version in chosen.items())
    assert 0.07 < Counter(chosen.values())[3] / 2000 < 0.13
    without_key = Counter(three.look_up(PROD).version for _ in range(2000))
    assert 0.05 < without_key[3] / 2000 < 0.15
    three.aliases.weigh("sql", "prod", {2: 80, 3: 20})
    moved = [key for key, version in chosen.items() if three.look_up(PROD, key).version != version]
    assert {chosen[key] for key in moved} == {2}, "a canary's users were taken back"
    assert 0.07 < len(moved) / 2000 < 0.13


def test_other_adapters_have_other_canaries() -> None:
    alias = Alias({1: 1, 2: 1})
    keys = [str(number) for number in range(200)]
    assert [alias.choose(key, "sql") for key in keys] != [alias.choose(key, "summary") for key in keys]


def test_rolling_back_goes_one_move_back_each_time(three: Catalog, store: Path) -> None:
    three.aliases.set("sql", "prod", 1)
    three.aliases.weigh("sql", "prod", {1: 9, 2: 1})
    three.aliases.set("sql", "prod", 2)
    three.aliases.set("sql", "prod", 2)  # no move
    three.close()
    again = Catalog(store, BASE)
    assert again.aliases.roll_back("sql", "prod").weights == {1: 9, 2: 1}
    assert again.aliases.roll_back("sql", "prod").weights == {1: 1}
    with pytest.raises(NothingToRollBack):
        again.aliases.roll_back("sql", "prod")
    assert again.aliases.roll_back("sql").weights == {2: 1}  # every commit moved the default
    again.close()


def test_rolling_back_skips_what_is_deleted(three: Catalog) -> None:
    three.aliases.set("sql", "prod", 1)
    three.aliases.weigh("sql", "prod", {1: 1, 2: 1})
    three.aliases.set("sql", "prod", 3)
    three.delete("sql", 2)
    assert three.aliases.roll_back("sql", "prod").weights == {1: 1}


def test_history_is_bounded(three: Catalog) -> None:
    for number in range(50):
        three.aliases.set("sql", "prod", number % 3 + 1)
    assert len(three.record("sql").routes["prod"].history) == MAX_HISTORY


def test_a_shared_version_is_in_use_and_a_forced_deletion_leaves_the_others(three: Catalog, store: Path) -> None:
    three.aliases.weigh("sql", "prod", {1: 50, 2: 50})
    with pytest.raises(AliasInUse, match="'prod'"):
        three.delete("sql", 1)
    three.delete("sql", 1, force=True)
    assert three.record("sql").routes["prod"].weights == {2: 50}
    assert json.loads((store / "aliases" / "sql" / "prod.json").read_bytes())["weights"] == {"2": 50}


def test_an_alias_can_be_removed(three: Catalog) -> None:
    three.aliases.set("sql", "prod", 1)
    three.aliases.remove("sql", "prod")
    with pytest.raises(AliasNotFound):
        three.look_up(PROD)
    with pytest.raises(AliasNotFound):
        three.aliases.remove("sql", "prod")
    three.delete("sql", 1)


@pytest.mark.parametrize(
    "weights", [{}, {1: 0}, {1: -1}, {1: True}, {1: 1.5}, {1: 10_001}, dict.fromkeys(range(1, 10), 1)]
)
def test_weights_that_are_none_are_refused(three: Catalog, weights: dict[int, int]) -> None:
    before = three.record("sql")
    with pytest.raises(InvalidWeights):
        three.aliases.weigh("sql", "prod", weights)
    assert three.record("sql") == before


def test_what_is_not_there_cannot_be_pointed_to(three: Catalog) -> None:
    with pytest.raises(VersionNotFound, match="no version 9"):
        three.aliases.weigh("sql", "prod", {1: 1, 9: 1})
    with pytest.raises(AdapterNotFound):
        three.aliases.set("nope", "prod", 1)
    with pytest.raises(InvalidName):
        three.aliases.set("sql", "latest", 1)


def test_a_change_sees_the_adapter_and_can_be_forbidden(three: Catalog) -> None:
    etag = three.record("sql").etag

    def only_if_unchanged(record: AdapterRecord | None) -> None:
        if record is None or record.etag != etag:
            raise PreconditionFailed("it has changed.")

    three.aliases.set("sql", "prod", 1, expect=only_if_unchanged)
    assert three.record("sql").etag != etag
    for change in (
        lambda: three.aliases.set("sql", "prod", 2, expect=only_if_unchanged),
        lambda: three.aliases.remove("sql", "prod", expect=only_if_unchanged),
        lambda: three.aliases.roll_back("sql", expect=only_if_unchanged),
        lambda: three.delete("sql", expect=only_if_unchanged),
        lambda: three.amend("sql", lambda said: said, expect=only_if_unchanged),
        lambda: commit(three, "sql", 8, expect=only_if_unchanged),
        lambda: commit(three, "new", 8, expect=only_if_unchanged),
    ):
        before = three.record("sql")
        with pytest.raises(PreconditionFailed):
            change()
        assert three.record("sql") == before
    assert three.num_adapters == 1


@pytest.mark.parametrize("data", [{}, {"weights": {}, "history": []}, {"weights": {"a": 1}, "history": []}])
def test_an_alias_that_cannot_be_read_is_damaged(data: dict[str, object]) -> None:
    with pytest.raises(StoreDamaged):
        Alias.from_json(data)
