"""Frames survive any cutting, and a worker never outlives its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.channel import (
    MAX_FRAME_BYTES,
    AsyncChannel,
    BadFrame,
    ChannelClosed,
    FrameDecoder,
    Worker,
    WorkerChannel,
    encode,
    spawn,
)

ECHO = """
import sys
from server.channel import ChannelClosed, WorkerChannel
channel = WorkerChannel.open(int(sys.argv[sys.argv.index("--fd") + 1]))
channel.send({"kind": "hello", "arguments": sys.argv[3:]})
while channel.wait():
    for message in channel.receive():
        if message["kind"] == "sleep":
            import time; time.sleep(60)
        channel.send(message)
"""

PARENT = """
import asyncio
from server.channel import spawn
async def main():
    worker = await spawn("echo_worker", on_message=lambda m: None, on_close=lambda: None)
    print(worker.process.pid, flush=True)
    worker.channel.send({"kind": "sleep"})
    await asyncio.sleep(60)
asyncio.run(main())
"""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_messages_survive_being_cut_anywhere(messages: list[dict[str, object]], num_bytes: int) -> None:
    stream = b"".join(encode(message) for message in messages)
    decoder = FrameDecoder()
    received = []
    for start in range(0, len(stream), num_bytes):
        received += decoder.feed(stream[start : start + num_bytes])
    assert received == messages


def test_a_frame_over_the_limit_is_refused_on_both_sides() -> None:
    with pytest.raises(BadFrame, match=str(MAX_FRAME_BYTES)):
        encode({"text": "x" * (MAX_FRAME_BYTES + 1)})
    with pytest.raises(BadFrame, match=str(MAX_FRAME_BYTES)):
        FrameDecoder().feed(struct.pack(">I", MAX_FRAME_BYTES + 1))
    assert FrameDecoder().feed(struct.pack(">I", MAX_FRAME_BYTES)) == []  # at the limit: waits for its bytes


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadFrame):
        FrameDecoder().feed(struct.pack(">I", len(body)) + body)


def test_a_nan_is_never_sent() -> None:
    with pytest.raises(BadFrame, match="finite"):
        encode({"logprob": float("nan")})


def test_receive_never_blocks_and_wait_sleeps_until_its_time_is_up() -> None:
    ours, theirs = socket.socketpair()
    channel = WorkerChannel(ours)
    assert channel.receive() == []
    started_s = time.monotonic()
    assert channel.wait(0.05) is False
    assert time.monotonic() - started_s >= 0.045
    theirs.sendall(encode({"a": 1}) + encode({"b": 2})[:3])
    assert channel.wait(5.0) is True
    assert channel.receive() == [{"a": 1}]
    theirs.close()
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()


def test_wake_ends_a_wait_from_another_thread() -> None:
    ours, theirs = socket.socketpair()
    channel = WorkerChannel(ours)
    threading.Timer(0.05, channel.wake).start()
    assert channel.wait(10.0) is True
    assert channel.receive() == []
    assert channel.wait(0.01) is False  # one wake, one end of a wait
    channel.close()
    theirs.close()


def test_two_senders_that_are_both_full_do_not_wait_for_each_other() -> None:
    large = {"text": "x" * 4_000_000}
    got: list[object] = []

    def exchange(channel: WorkerChannel) -> None:
        channel.send(large)
        while channel.wait(20.0):
            messages = channel.receive()
            if messages:
                got.extend(messages)
                return

    channels = [WorkerChannel(sock) for sock in socket.socketpair()]
    threads = [threading.Thread(target=exchange, args=(channel,), daemon=True) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == [large, large]
    for channel in channels:
        channel.close()


@pytest.fixture
def echo_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    return tmp_path


def test_a_spawned_worker_answers_and_hangs_up_when_told(echo_path: Path) -> None:
    async def converse() -> tuple[list[dict[str, object]], int]:
        inbox: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        closed = asyncio.Event()
        worker: Worker = await spawn("echo_worker", "--flag", on_message=inbox.put_nowait, on_close=closed.set)
        os.kill(worker.process.pid, 0)
        got = [await inbox.get()]
        os.kill(worker.process.pid, signal.SIGTERM)  # ignored: the front decides
        for number in range(3):
            worker.channel.send({"kind": "echo", "number": number})
            got.append(await inbox.get())
        code = await worker.close()
        await closed.wait()
        return got, code

    got, code = asyncio.run(converse())
    assert got[0] == {"kind": "hello", "arguments": ["--flag"]}
    assert [message["number"] for message in got[1:]] == [0, 1, 2]
    assert code != -signal.SIGKILL


def test_a_worker_dies_with_its_parent_even_in_the_middle_of_work(echo_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker_pid = int(parent.stdout.readline())
    time.sleep(0.3)  # it is asleep in its work now
    os.kill(worker_pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline_s = time.monotonic() + 10
    while _is_running(worker_pid):
        assert time.monotonic() < deadline_s, "the worker outlived its parent"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_ends_just_before_it_is_killed_is_no_error() -> None:
    class Ending:
        """Ends in the moment between the end of the wait and the kill."""

        def __init__(self) -> None:
            self.waits = 0

        async def wait(self) -> int:
            self.waits += 1
            if self.waits == 1:
                raise TimeoutError
            return 7

        def kill(self) -> None:
            raise ProcessLookupError

    async def scene() -> None:
        worker = Worker(cast(Any, Ending()), AsyncChannel(lambda message: None, lambda: None))
        assert await worker.close(0.1) == 7

    asyncio.run(scene())
