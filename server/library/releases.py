"""How a version comes to answer under an alias, and how it is taken back.

    await releases.move("sql", "prod", {4: 1})               golden prompts first, where the alias has a gate
    await releases.roll_back("sql", "prod")                  what it meant before, at once
    await releases.start_canary("sql", "prod", order)        a share of the requests, until too many of them fail
    releases.observe("sql", 4, failed=True)                  told of every request that ended

A version that an alias has pointed to, and a rollback brings back, has passed its gate before: it is not asked again.
Gates and canaries are files of the store, so they outlive the process, and every process on the store follows them;
how requests fare is counted by each process for itself, over those that it answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime

from adapters_store.alias import Alias, Weights
from adapters_store.alias_rules import AliasKey
from adapters_store.catalog import Catalog, Committed
from adapters_store.errors import AliasNotFound, PreconditionFailed, StoreError
from adapters_store.names import DEFAULT_ALIAS, Reference, check_alias
from adapters_store.record import AdapterRecord, Expectation
from server.library.canary import Canary, CanaryState, CanaryWatch
from server.library.errors import CanaryConflict, GateFailed
from server.library.gate import Answer, Gate, Verdict
from server.library.shared_work import SharedWork

logger = logging.getLogger(__name__)
REFRESH_S = 2.0  # how old may what is known of other processes' canaries be
_GATE, _CANARY = "gate", "canary"
OnEnded = Callable[[AliasKey, Canary], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CanaryOrder:
    version: int
    percent: int  # 1..99 of the alias's requests
    max_error_rate: float
    min_requests: int = 20
    window: int = 200


class Releases:
    """Belongs to one event loop; what blocks on the disk runs in threads."""

    def __init__(self, catalog: Catalog) -> None:
        self.answer: Answer | None = None  # set by whoever can generate
        self.on_moved: Callable[[], Awaitable[None]] = _nothing
        self.on_rolled_back: OnEnded | None = None
        self._catalog = catalog
        self._rules = catalog.rules
        self._work = SharedWork()
        self._watches: dict[AliasKey, CanaryWatch] = {}
        self._refreshed_s = 0.0

    async def close(self) -> None:
        await self._work.close()

    # -------------------------------------------------------------------- moving

    async def move(
        self, name: str, alias: str, weights: Weights, *, expect: Expectation | None = None, skip_gate: bool = False
    ) -> Alias:
        """Points an alias to versions by weight. A canary that runs on it ends.

        Raises:
            InvalidName, InvalidWeights, AdapterNotFound, VersionNotFound, PreconditionFailed, DiskFull.
            GateFailed: the alias means what it meant.
        """
        key = AliasKey(name, check_alias(alias))
        async with self._turn(name):
            if not skip_gate:
                await self._pass_gate(key, weights)
            moved = await asyncio.to_thread(self._catalog.aliases.weigh, name, alias, weights, expect=expect)
            await self._end(key, CanaryState.MOVED, f"{key} was moved")
        await self.on_moved()
        return moved

    async def promote(self, committed: Committed, aliases: Iterable[str]) -> None:
        """Points gated aliases to a version that has just been committed.

        Raises as `move`; a GateFailed says what was committed all the same.
        """
        version = committed.version
        try:
            for alias in aliases:
                await self.move(version.name, alias, {version.version: 1})
        except GateFailed as error:
            error.committed = committed
            raise

    async def roll_back(self, name: str, alias: str = DEFAULT_ALIAS, *, expect: Expectation | None = None) -> Alias:
        """Gives an alias its newest earlier meaning. Raises as `AliasBook.roll_back`, InvalidName."""
        key = AliasKey(name, check_alias(alias))
        async with self._turn(name):
            restored = await asyncio.to_thread(self._catalog.aliases.roll_back, name, alias, expect=expect)
            await self._end(key, CanaryState.STOPPED, f"{key} was rolled back")
        await self.on_moved()
        return restored

    async def remove(self, name: str, alias: str, *, expect: Expectation | None = None) -> None:
        """Forgets an alias, with its gate and its canary. Raises AdapterNotFound, AliasNotFound, PreconditionFailed."""
        key = AliasKey(name, check_alias(alias))
        async with self._turn(name):
            await asyncio.to_thread(self._catalog.aliases.remove, name, alias, expect=expect)
            for kind in (_GATE, _CANARY):
                await asyncio.to_thread(self._rules.write, key, kind, None)
            self._watches.pop(key, None)
        await self.on_moved()

    async def forget(self, name: str) -> None:
        """An adapter was deleted, its gates and canaries with it: nothing of it is watched any more."""
        self._watches = {key: watch for key, watch in self._watches.items() if key.name != name}

    # --------------------------------------------------------------------- gates

    async def set_gate(self, name: str, alias: str, gate: Gate | None, *, expect: Expectation | None = None) -> None:
        """From now on the alias takes in only versions that pass; those it means already are not asked.

        Raises InvalidName, AdapterNotFound, PreconditionFailed, DiskFull.
        """
        key = AliasKey(name, check_alias(alias))
        rule = None if gate is None else gate.to_json()
        await asyncio.to_thread(self._rules.write, key, _GATE, rule, expect=expect)

    async def gate(self, name: str, alias: str) -> Gate | None:
        rule = (await asyncio.to_thread(self._rules.read, AliasKey(name, alias))).get(_GATE)
        return None if rule is None else Gate.from_json(rule)

    async def gated(self, name: str, aliases: Iterable[str]) -> tuple[str, ...]:
        """Those of the aliases that have a gate."""
        return tuple([alias for alias in aliases if await self.gate(name, alias) is not None])

    async def judge(self, name: str, alias: str, version: int) -> Verdict:
        """Asks a version an alias's golden prompts and moves nothing. Raises GateFailed: there are none."""
        gate = await self.gate(name, alias)
        if gate is None:
            raise GateFailed(f"{name}@{alias} has no gate, so there is nothing to ask.")
        return await self._ask(gate, AliasKey(name, alias), version)

    async def _pass_gate(self, key: AliasKey, weights: Weights) -> None:
        gate = await self.gate(key.name, key.alias)
        if gate is None:
            return
        present = self._catalog.record(key.name).routes.get(key.alias)
        for version in sorted(set(weights) - set(present.weights if present else ())):
            verdict = await self._ask(gate, key, version)
            if not verdict.passed:
                raise GateFailed(f"{key} stays where it is: {verdict}.", verdict)

    async def _ask(self, gate: Gate, key: AliasKey, version: int) -> Verdict:
        self._catalog.look_up(Reference(key.name, version, None))
        if self.answer is None:
            raise GateFailed(f"{key} has a gate, and this process cannot ask golden prompts yet.")
        return await gate.judge(f"{key.name}@{version}", self.answer)

    # ------------------------------------------------------------------ canaries

    async def start_canary(
        self,
        name: str,
        alias: str,
        order: CanaryOrder,
        *,
        expect: Expectation | None = None,
        skip_gate: bool = False,
    ) -> Canary:
        """Gives a version a share of an alias's requests, and takes it back when too many of them fail.

        Raises:
            CanaryConflict: the alias is shared by several versions already, or means this version alone.
            As `move`, and AliasNotFound.
        """
        key = AliasKey(name, check_alias(alias))
        async with self._turn(name):
            before = self._meaning(key)
            if len(before) > 1 or order.version in before:
                raise CanaryConflict(
                    f"{key} means {dict(before)}; a canary needs an alias of one version, and another version. "
                    "Move the alias first."
                )
            weights = {next(iter(before)): 100 - order.percent, order.version: order.percent}
            if not skip_gate:
                await self._pass_gate(key, weights)
            canary = Canary(
                order.version, before, weights, order.max_error_rate, order.min_requests, order.window, _now()
            )
            # The rule first: a canary that gets requests and is not watched would be worse than one without requests.
            await asyncio.to_thread(self._rules.write, key, _CANARY, canary.to_json())
            try:
                await asyncio.to_thread(self._catalog.aliases.weigh, name, alias, weights, expect=expect)
            except BaseException:
                await asyncio.to_thread(self._rules.write, key, _CANARY, None)
                raise
            self._watches[key] = CanaryWatch(canary)
        await self.on_moved()
        return canary

    async def stop_canary(self, name: str, alias: str, *, expect: Expectation | None = None) -> Canary:
        """Gives the alias back its meaning from before the canary.

        Raises CanaryConflict: none runs; PreconditionFailed: `expect` forbids it, or the alias was moved meanwhile.
        """
        key = AliasKey(name, check_alias(alias))
        async with self._turn(name):
            found = await self._find_canary(key)
            if found is None or found.state is not CanaryState.RUNNING:
                raise CanaryConflict(f"no canary runs on {key}.")
            await self._restore(key, found, expect)
            ended = await self._end(key, CanaryState.STOPPED, "it was stopped")
            assert ended is not None
        await self.on_moved()
        return ended

    async def canary(self, name: str, alias: str) -> tuple[Canary, CanaryWatch | None]:
        """The last canary of an alias, and this process's counts while it runs. Raises CanaryConflict: none yet."""
        key = AliasKey(name, check_alias(alias))
        await self.refresh()
        found = await self._find_canary(key)
        if found is None:
            raise CanaryConflict(f"{key} has had no canary.")
        return found, self._watches.get(key)

    def observe(self, name: str, version: int, *, failed: bool) -> None:
        """Counts how one request on a version ended, wherever a canary runs on it. Never waits."""
        if time.monotonic() - self._refreshed_s > REFRESH_S:
            self._refreshed_s = time.monotonic()
            self._work.start(self.refresh())
        for key, watch in list(self._watches.items()):
            if key.name != name or watch.canary.version != version:
                continue
            reason = watch.see(failed=failed)
            if reason is not None:
                del self._watches[key]  # so that it is rolled back once
                self._work.start(self._roll_back_by_itself(key, watch.canary, reason))

    async def refresh(self) -> None:
        """Follows what other processes on the store did to their canaries. A rule that cannot be read stops nothing."""
        self._refreshed_s = time.monotonic()
        try:
            rules = await asyncio.to_thread(lambda: dict(self._rules.all(_CANARY)))
            found = {key: Canary.from_json(rule) for key, rule in rules.items()}
        except (StoreError, OSError) as error:
            logger.error("the canaries of the store cannot be read: %s", error)
            return
        running = {key: canary for key, canary in found.items() if canary.state is CanaryState.RUNNING}
        known = {key: watch for key, watch in self._watches.items() if running.get(key) == watch.canary}
        self._watches = {key: known.get(key) or CanaryWatch(canary) for key, canary in running.items()}

    async def _roll_back_by_itself(self, key: AliasKey, canary: Canary, reason: str) -> None:
        async with self._turn(key.name):
            present = await self._find_canary(key)
            if present != canary:  # somebody was faster
                return
            state = CanaryState.ROLLED_BACK
            try:
                await self._restore(key, canary)
            except (StoreError, OSError) as error:
                state, reason = CanaryState.MOVED, f"{reason}; it was not rolled back, because {error}"
            ended = await self._end(key, state, reason)
        await self.on_moved()
        logger.warning("the canary %s@%d of %s ended (%s): %s", key.name, canary.version, key, state, reason)
        if self.on_rolled_back is not None and ended is not None:
            await self.on_rolled_back(key, ended)

    async def _restore(self, key: AliasKey, canary: Canary, expect: Expectation | None = None) -> None:
        """Back to before the canary, unless the alias has been moved since. Raises StoreError."""

        def still_as_it_was(record: AdapterRecord | None) -> None:
            if expect is not None:
                expect(record)
            route = None if record is None else record.routes.get(key.alias)
            if route is None or dict(route.weights) != dict(canary.weights):
                raise PreconditionFailed(f"{key} has been moved since the canary began.")

        await asyncio.to_thread(self._catalog.aliases.roll_back, key.name, key.alias, expect=still_as_it_was)

    async def _end(self, key: AliasKey, state: CanaryState, reason: str) -> Canary | None:
        """Writes down that the canary of an alias ended; None if none ran."""
        self._watches.pop(key, None)
        found = await self._find_canary(key)
        if found is None or found.state is not CanaryState.RUNNING:
            return None
        ended = found.ended(state, reason, _now())
        await asyncio.to_thread(self._rules.write, key, _CANARY, ended.to_json())
        return ended

    async def _find_canary(self, key: AliasKey) -> Canary | None:
        rule = (await asyncio.to_thread(self._rules.read, key)).get(_CANARY)
        return None if rule is None else Canary.from_json(rule)

    def _meaning(self, key: AliasKey) -> Weights:
        route = self._catalog.record(key.name).routes.get(key.alias)
        if route is None:
            raise AliasNotFound(f"adapter {key.name!r} has no alias {key.alias!r}.")
        return dict(route.weights)

    def _turn(self, name: str) -> AbstractAsyncContextManager[None]:
        return self._work.turn(name)


async def _nothing() -> None:
    """Nobody follows what aliases mean."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
