"""Many clients at once, slow ones, and ones that vanish: nobody waits for them, and nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from urllib.parse import urlsplit

from tests.clients.running import RunningServer, is_idle

NUM_AT_ONCE = 2000
NUM_SLOW_TOKENS = 400
LONG = {"inputs": "once upon", "adapter": "poet", "parameters": {"max_new_tokens": 1900}}


def raw_request(url: str, path: str, body: object) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return (head + f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n").encode() + content


def connect(url: str, *, receive_buffer_bytes: int | None = None) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    opened = socket.socket()
    if receive_buffer_bytes is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    opened.settimeout(60)
    opened.connect((parts.hostname, parts.port))
    return opened


def test_of_two_thousand_at_once_each_gets_an_answer_or_a_429(server: RunningServer) -> None:
    adapters = [None, "poet", "sql"]

    async def one(number: int) -> tuple[int, bytes]:
        body = {"inputs": f"request {number}", "adapter": adapters[number % 3], "parameters": {"max_new_tokens": 4}}
        parts = urlsplit(server.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(raw_request(server.url, "/generate", body))
        answer = await reader.read()
        writer.close()
        return int(answer[9:12]), answer

    async def all_at_once() -> list[tuple[int, bytes]]:
        return await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(NUM_AT_ONCE))), 120)

    answers = asyncio.run(all_at_once())
    statuses = Counter(status for status, _ in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 256, statuses
    assert statuses[429] > 0, "the queue must have been full for this to show anything"
    for status, answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        if status == 429:
            assert b"retry-after: " in head.lower()
            assert json.loads(body)["error_type"] == "overloaded"
        else:
            assert json.loads(body)["generated_text"] is not None
    assert is_idle(server.wait_until_idle())


def test_vanished_clients_leave_nothing_behind(server: RunningServer) -> None:
    opened = [connect(server.url) for _ in range(24)]
    for client in opened:
        client.sendall(raw_request(server.url, "/generate_stream", LONG))
    for client in opened:
        assert b"data: " in client.recv(4096) + client.recv(4096)
    assert not is_idle(server.cache()), "they must run for this to show anything"
    for client in opened:
        client.close()
    started_s = time.monotonic()
    assert is_idle(server.wait_until_idle())
    assert time.monotonic() - started_s < 5.0, "1,900 tokens for each of 24 would take far longer"


def test_clients_that_vanish_before_the_answer_leave_nothing_behind(server: RunningServer) -> None:
    opened = [connect(server.url) for _ in range(8)]
    for client in opened:
        client.sendall(raw_request(server.url, "/generate", LONG))
    deadline_s = time.monotonic() + 10
    while is_idle(server.cache()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_idle(server.cache())
    for client in opened:
        client.close()
    assert is_idle(server.wait_until_idle())


def test_slow_readers_hold_nobody_up_and_lose_nothing(server: RunningServer) -> None:
    slow = [connect(server.url, receive_buffer_bytes=4096) for _ in range(4)]
    body = {"inputs": "once upon", "parameters": {"max_new_tokens": NUM_SLOW_TOKENS}}
    for client in slow:
        client.sendall(raw_request(server.url, "/generate_stream", body))
    quick = server.post("/generate", {"inputs": "once upon", "parameters": {"max_new_tokens": 8}})
    assert quick.status_code == 200
    time.sleep(1.0)
    texts = []
    for client in slow:
        received = b""
        while piece := client.recv(65536):
            received += piece
        client.close()
        assert received.count(b'"index":') == NUM_SLOW_TOKENS
        texts.append(received[received.rindex(b'"generated_text"') :])
    assert len(set(texts)) == 1
    assert is_idle(server.wait_until_idle())
