"""The usage ledger: what is on disk is what was used, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from server.usage import Account, UsageLedger, Use, read_usage
from tests.api.asgi_call import AsgiCall
from tests.api.conftest import Door, Visit
from tests.api.keyed import make_keys, of

SQL = Account("bi", "sql", 3)
ONE = Use(1, 0, 10, 4, 7)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def test_uses_add_up_over_processes_and_days(tmp_path: Path) -> None:
    day = [date(2026, 11, 25)]
    first, second = UsageLedger(tmp_path, today=lambda: day[0]), UsageLedger(tmp_path, today=lambda: day[0])
    for _ in range(3):
        first.note(SQL, ONE)
    second.note(SQL, ONE)
    second.note(Account("", "", 0), Use(1, 1))
    wait_for(lambda: len(read_usage(tmp_path)) == 2)
    day[0] = date(2026, 11, 26)
    second.note(SQL, ONE)
    first.close()
    second.close()
    assert read_usage(tmp_path) == {SQL: Use(5, 0, 50, 20, 35), Account("", "", 0): Use(1, 1)}
    assert read_usage(tmp_path, since=date(2026, 11, 26)) == {SQL: ONE}
    assert read_usage(tmp_path, until=date(2026, 11, 25))[SQL] == Use(4, 0, 40, 16, 28)
    assert len(list(tmp_path.iterdir())) == 3, "one file a process and day"


def test_a_line_that_a_crash_cut_off_is_skipped_and_the_rest_counts(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path)
    ledger.note(SQL, ONE)
    ledger.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert read_usage(tmp_path) == {SQL: ONE}, cut
    path.write_bytes(b"damage\n" + whole + b"[1]\n" + whole)
    assert read_usage(tmp_path) == {SQL: ONE + ONE}


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.usage._RETRY_S", 0.05)
    is_full, write = [True], os.write

    def failing(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: len(data) // 2]) if is_full[0] else write(descriptor, data)

    monkeypatch.setattr("server.usage.os.write", failing)
    ledger = UsageLedger(tmp_path)
    ledger.note(SQL, ONE)
    time.sleep(0.2)
    ledger.note(SQL, ONE)
    assert read_usage(tmp_path) == {}
    is_full[0] = False
    wait_for(lambda: read_usage(tmp_path) == {SQL: ONE + ONE})
    ledger.close()
    assert sum(path.read_bytes().count(b"\n") for path in tmp_path.iterdir()) <= 2, "no half of a line stays"


def test_a_ledger_that_is_closed_while_it_takes_its_news_ends(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path)

    class ClosedMeanwhile(threading.Event):
        def clear(self) -> None:
            ledger._is_closing.set()
            self.set()
            super().clear()

    news, ledger._has_news = ledger._has_news, ClosedMeanwhile()
    news.set()  # the thread wakes, and hears of the end in that very moment
    ledger._thread.join(5)
    assert not ledger._thread.is_alive()


_WRITER = """
import sys
from pathlib import Path
from server.usage import Account, Use, UsageLedger
ledger = UsageLedger(Path(sys.argv[1]))
for number in range(10**9):
    ledger.note(Account("bi", "sql", 1 + number % 3), Use(1, 0, 2, 0, 3))
    print(number + 1, flush=True)
"""


def test_kill_9_loses_the_last_moment_at_most(tmp_path: Path) -> None:
    for _ in range(2):
        before = sum(use.requests for use in read_usage(tmp_path).values())
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        noted: list[tuple[float, int]] = []
        until_s = time.monotonic() + 2.0
        while time.monotonic() < until_s:
            noted.append((time.monotonic(), int(writer.stdout.readline())))
        writer.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        writer.communicate()
        told = [number for at_s, number in noted if at_s < killed_s - 1.0][-1]
        total = sum(use.requests for use in read_usage(tmp_path).values()) - before
        assert told <= total, "what had ended a second before is on disk"
        assert all(use.generated_tokens == 3 * use.requests for use in read_usage(tmp_path).values())


def test_the_route_tells_a_key_of_itself_and_a_reader_of_all(visit: Visit, tmp_path: Path) -> None:
    keys = make_keys(
        tmp_path / "keys.json",
        root={"scopes": ["read", "generate", "admin"]},
        bi={"scopes": ["read", "generate"], "adapters": ["sql"]},
    )

    async def test(door: Door) -> None:
        door.service.ledger = ledger = UsageLedger(tmp_path / "usage")
        door.client.headers.update(of("root"))
        await door.upload("sql")
        await door.generate("a b c", adapter="sql")
        await door.client.post("/generate", json={"inputs": "a b", "adapter": "sql"}, headers=of("bi"))
        await door.client.post("/generate", json={"inputs": "a @fail"}, headers=of("bi"))
        await door.client.post("/generate", json={"inputs": "a", "adapter": "never"}, headers=of("bi"))
        ledger.close()

        async def rows(who: str, **query: Any) -> list[tuple[Any, ...]]:
            answer = await door.client.get("/admin/v1/usage", params=query, headers=of(who))
            fields = ("key", "adapter", "version", "requests", "unfinished", "prompt_tokens", "generated_tokens")
            return [tuple(row[field] for field in fields) for row in answer.json()["data"]]

        own = [("bi", None, None, 1, 1, 2, 2), ("bi", "sql", 1, 1, 0, 2, 10)]
        assert await rows("bi") == own
        assert await rows("root") == [*own, ("root", "sql", 1, 1, 0, 3, 10)]
        assert await rows("root", key="root") == [("root", "sql", 1, 1, 0, 3, 10)]
        assert await rows("bi", key="root") == []
        assert len(await rows("root", adapter="sql")) == 2
        assert await rows("root", since="2100-01-01") == []

    visit(test, keys_file=keys)


def test_tokens_that_were_sent_before_the_client_left_count(visit: Visit, tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        door.service.ledger = ledger = UsageLedger(tmp_path / "usage")
        call = AsgiCall(door.app, "/generate_stream", {"inputs": "a @slow", "parameters": {"max_new_tokens": 10}})
        await call.wait_for_chunks(3)
        call.leave()
        await call.finish()
        ledger.close()
        (use,) = read_usage(tmp_path / "usage").values()
        assert (use.requests, use.unfinished, use.prompt_tokens) == (1, 1, 2)
        assert 3 <= use.generated_tokens < 10

    visit(test)


def test_without_a_ledger_the_route_says_so(visit: Visit) -> None:
    async def test(door: Door) -> None:
        answer = await door.client.get("/admin/v1/usage")
        assert answer.status_code == 404
        assert json.loads(answer.text)["error"]["code"] == "no_usage_ledger"

    visit(test)
