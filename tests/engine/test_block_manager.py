"""The pool of units: lowest first for K/V, highest runs for adapters, one LRU of what is idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.engine import block_hash
from server.engine.block_manager import BlockManager

HASHES = [bytes([i]) * 16 for i in range(64)]


def pool_of(num_units: int) -> tuple[BlockManager, list[tuple[int, str]]]:
    pool = BlockManager(num_units)
    evicted: list[tuple[int, str]] = []
    pool.on_run_evicted = lambda first, reason: evicted.append((first, reason))
    return pool, evicted


def allocate(pool: BlockManager, count: int) -> list[int]:
    units = pool.allocate(count)
    assert units is not None
    return [int(unit) for unit in units]


def cache(pool: BlockManager, count: int, first_hash: int) -> list[int]:
    """Blocks that were computed, registered and left."""
    units = allocate(pool, count)
    for i, unit in enumerate(units):
        pool.register(unit, HASHES[first_hash + i])
    pool.release(np.array(units, np.int32))
    pool.tick += 1
    return units


def test_blocks_come_from_the_low_end_and_runs_from_the_high_end() -> None:
    pool, _ = pool_of(10)
    assert allocate(pool, 3) == [0, 1, 2]
    assert pool.take_run(2) == 8
    assert pool.take_run(3) == 5
    pool.release(np.array([1], np.int32))
    assert allocate(pool, 2) == [1, 3]
    pool.check_integrity()


def test_what_the_pool_cannot_give_is_none_and_changes_nothing() -> None:
    pool, _ = pool_of(6)
    cached = cache(pool, 2, 0)
    allocate(pool, 3)
    assert pool.allocate(4) is None
    assert pool.match(HASHES) == cached
    assert pool.take_run(4) is None
    assert pool.match(HASHES) == cached
    pool.check_integrity()


def test_a_cached_block_is_found_by_its_chain_until_it_is_evicted() -> None:
    pool, _ = pool_of(6)
    cached = cache(pool, 3, 0)
    assert pool.match(HASHES[:5]) == cached
    assert pool.match(HASHES[1:]) == cached[1:], "the pool matches hashes; chaining them is block_hash's work"
    assert pool.match([HASHES[9], HASHES[0]]) == []
    allocate(pool, 5)
    assert pool.match(HASHES) == cached[:1], "the tail of a chain goes first"


def test_a_shared_block_stays_as_long_as_anyone_uses_it() -> None:
    pool, _ = pool_of(4)
    cached = cache(pool, 2, 0)
    pool.share(cached)
    pool.share(cached)
    pool.release(np.array(cached, np.int32))
    assert pool.allocate(3) is None
    pool.release(np.array(cached, np.int32))
    assert allocate(pool, 3)
    pool.check_integrity()


def test_the_first_block_of_a_hash_stays_the_known_one() -> None:
    pool, _ = pool_of(4)
    first, second = allocate(pool, 2)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[0])
    pool.release(np.array([first, second], np.int32))
    assert pool.match(HASHES[:1]) == [first]
    assert pool.num_cached == 1
    pool.check_integrity()


def test_a_discarded_block_is_not_found_again_whether_used_or_not() -> None:
    pool, _ = pool_of(4)
    cached = cache(pool, 1, 0)
    (used,) = allocate(pool, 1)
    pool.register(used, HASHES[1])
    pool.discard([*cached, used])
    assert pool.match(HASHES[:1]) == pool.match(HASHES[1:2]) == []
    pool.check_integrity()
    pool.release(np.array([used], np.int32))
    assert pool.num_free == 4


def test_blocks_and_adapters_are_evicted_oldest_first_whoever_they_are() -> None:
    pool, evicted = pool_of(8)
    old = pool.take_run(2)
    assert old is not None
    pool.idle_run(old)
    pool.tick += 1
    cached = cache(pool, 2, 0)
    young = pool.take_run(2)
    assert young is not None
    pool.idle_run(young)
    pool.tick += 1
    allocate(pool, 2)
    assert evicted == [], "there were free units"
    allocate(pool, 1)
    assert evicted == [(old, "kv")]
    allocate(pool, 2)
    assert pool.match(HASHES) == cached[:1]
    assert evicted == [(old, "kv")]
    allocate(pool, 2)
    assert evicted == [(old, "kv"), (young, "kv")]
    pool.check_integrity()


def test_a_pinned_run_is_never_evicted() -> None:
    pool, evicted = pool_of(6)
    first = pool.take_run(3)
    assert first is not None
    pool.tick += 1
    assert pool.allocate(4) is None
    assert pool.take_run(4) is None
    pool.idle_run(first)
    pool.pin_run(first)
    assert pool.allocate(4) is None
    assert evicted == []


def test_a_run_is_placed_where_least_is_lost() -> None:
    pool, evicted = pool_of(12)
    adapter = pool.take_run(4)  # 8..11
    assert adapter == 8
    pool.idle_run(adapter)
    pool.tick += 1
    cached = cache(pool, 3, 0)  # 0..2, then 3..7 are free
    allocate(pool, 1)
    assert pool.take_run(4) == 4, "free units are lost for nothing"
    assert evicted == []
    pool.tick += 20
    assert pool.take_run(3) == 0, "three cached blocks are less than four units of an adapter"
    assert pool.match(HASHES) == []
    assert cached == [0, 1, 2]
    pool.check_integrity()


def test_of_equal_losses_the_older_goes() -> None:
    pool, evicted = pool_of(8)
    first, second = pool.take_run(4), pool.take_run(4)
    assert (first, second) == (4, 0)
    pool.idle_run(4)
    pool.tick += 1
    pool.idle_run(0)
    pool.tick += 1
    assert pool.take_run(4) == 4
    assert evicted == [(4, "adapter")]


def test_a_run_touched_in_this_step_does_not_make_room_for_another() -> None:
    pool, evicted = pool_of(4)
    first = pool.take_run(4)
    assert first is not None
    pool.idle_run(first)
    assert pool.take_run(4) is None
    pool.tick += 1
    assert pool.take_run(4) == 0
    assert evicted == [(0, "adapter")]


def test_a_run_blocked_by_blocks_in_use_finds_another_place_or_none() -> None:
    pool, _ = pool_of(8)
    units = allocate(pool, 8)
    pool.release(np.array(units[:3] + units[4:7], np.int32))  # 3 and 7 are in use
    assert pool.take_run(4) is None
    assert pool.take_run(3) == 4
    assert pool.take_run(3) == 0
    pool.check_integrity()


def test_a_vain_search_is_repeated_only_after_something_was_released() -> None:
    pool, _ = pool_of(4)
    units = allocate(pool, 4)
    assert pool.take_run(2) is None
    pool.release(np.array(units[2:], np.int32))
    assert pool.take_run(2) == 2


def test_units_of_a_freed_run_serve_blocks_again() -> None:
    pool, _ = pool_of(5)
    first = pool.take_run(3)
    assert first is not None
    pool.free_run(first)
    assert allocate(pool, 5) == [0, 1, 2, 3, 4]
    pool.check_integrity()


def test_without_caching_nothing_is_kept() -> None:
    pool = BlockManager(4, enable_prefix_caching=False)
    cache(pool, 2, 0)
    assert pool.num_free == 4


def test_a_pool_larger_than_int32_bytes_counts_units_not_bytes() -> None:
    pool, _ = pool_of(200_000)
    assert pool.take_run(100_000) == 100_000
    assert allocate(pool, 100_000)[-1] == 99_999
    assert pool.allocate(1) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda pool: pool.refs.__setitem__(0, 0),
        lambda pool: pool.refs.__setitem__(5, 1),
        lambda pool: pool.owner.__setitem__(0, 0),
        lambda pool: pool.owner.__setitem__(7, 0),
        lambda pool: setattr(pool, "num_free", 3),
        lambda pool: setattr(pool, "num_cached", 0),
        lambda pool: pool._lru.popitem(),
        lambda pool: pool._by_hash.clear(),
        lambda pool: pool._free_heap.clear(),
    ],
    ids=["a user lost", "a user invented", "a block lost", "a run cut", "free", "cached", "lru", "hashes", "heap"],
)
def test_every_planted_fault_is_seen(harm: Callable[[Any], object]) -> None:
    pool, _ = pool_of(8)
    cache(pool, 2, 0)
    pool.share([0])
    assert pool.take_run(2) == 6
    pool.idle_run(6)
    pool.check_integrity()
    harm(pool)
    with pytest.raises(AssertionError, match="pool:"):
        pool.check_integrity()


def test_hashes_depend_on_the_seed_and_on_everything_before() -> None:
    def chain(key: str, salt: str, tokens: list[int]) -> list[bytes]:
        hashes: list[bytes] = []
        array = np.array(tokens, np.int32)
        block_hash.extend(hashes, block_hash.seed(key, salt), array, len(tokens) // 4, 4)
        return hashes

    plain = chain("k", "s", [1, 2, 3, 4, 5, 6, 7, 8])
    assert plain == chain("k", "s", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(set(plain)) == 2
    others = [chain("k", "t", [1, 2, 3, 4]), chain("l", "s", [1, 2, 3, 4]), chain("k:s", "", [1, 2, 3, 4])]
    assert len({plain[0], *(other[0] for other in others), chain("k", ":s", [1, 2, 3, 4])[0]}) == 5
    assert chain("k", "s", [0, 2, 3, 4, 5, 6, 7, 8])[1] != plain[1]


def test_hashes_are_extended_as_a_sequence_grows() -> None:
    tokens = np.arange(12, dtype=np.int32)
    start = block_hash.seed("k", "s")
    whole: list[bytes] = []
    block_hash.extend(whole, start, tokens, 3, 4)
    grown: list[bytes] = []
    for num_blocks in (1, 1, 3):
        block_hash.extend(grown, grown[-1] if grown else start, tokens, num_blocks, 4)
    assert grown == whole
