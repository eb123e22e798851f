"""Streams from a running server: sent at their times, read as cheaply as possible, timed token by token.

The client shares the machine with the server, so it does no more than it must: one socket a stream, events counted,
not parsed. A stream that fails is a result, not an exception.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from bench.models import text_of
from bench.workloads import BASE, Workload

_EVENT = b"data:"
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class Stream:
    """What became of one request; times in seconds since the start of the load."""

    due_s: float
    num_asked: int
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token_s(self) -> float:
        """From when it was due, so that a client that is late does not flatter the server."""
        return self.token_times_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between neighbouring tokens, as they came: tokens of one event batch have gaps of zero before a long one."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


@dataclass(slots=True)
class Load:
    streams: list[Stream]
    total_s: float

    @property
    def ended(self) -> list[Stream]:
        return [one for one in self.streams if one.error is None]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(one.token_times_s) for one in self.streams) / self.total_s


def bodies(workload: Workload, adapter_names: Sequence[str], vocab_size: int) -> list[bytes]:
    """One JSON body an arrival: greedy, of exact length. Adapter i is the i-th name, counted round."""
    made = []
    for index, arrival in enumerate(workload.arrivals):
        body: dict[str, object] = {
            "inputs": text_of(workload.prompt_tokens(index, vocab_size)),
            "parameters": {"max_new_tokens": arrival.num_output_tokens, "ignore_eos_token": True},
        }
        if arrival.adapter != BASE:
            body["adapter"] = adapter_names[arrival.adapter % len(adapter_names)]
        made.append(json.dumps(body).encode())
    return made


async def send(url: str, workload: Workload, made: Sequence[bytes]) -> Load:
    """Open loop: each request goes out at its time, whatever became of the others; returns when all have ended."""
    start_s = time.perf_counter()
    streams = [Stream(one.arrival_s, one.num_output_tokens) for one in workload.arrivals]
    await asyncio.gather(*(_send(url, body, one, start_s) for body, one in zip(made, streams, strict=True)))
    return Load(streams, time.perf_counter() - start_s)


async def _send(url: str, body: bytes, stream: Stream, start_s: float) -> None:
    await asyncio.sleep(max(0.0, start_s + stream.due_s - time.perf_counter()))
    address = urlsplit(url)
    assert address.hostname is not None, "the URL of a server has a host"
    head = (
        f"POST /generate_stream HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
        try:
            writer.write(head.encode() + body)
            await _read(reader, stream, start_s)
        finally:
            writer.close()
    except OSError as error:
        stream.error = f"{type(error).__name__}: {error}"
    if stream.error is None and len(stream.token_times_s) != stream.num_asked:
        stream.error = f"{len(stream.token_times_s)} tokens came, {stream.num_asked} were asked for"


async def _read(reader: asyncio.StreamReader, stream: Stream, start_s: float) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        stream.error = (head.split(b"\r\n", 1)[0] + b": " + await reader.read(_READ_BYTES)).decode(errors="replace")
        return
    tail = b""
    while data := await reader.read(_READ_BYTES):
        now_s = time.perf_counter() - start_s
        if b'"error"' in data:
            stream.error = data.decode(errors="replace")
            return
        stream.token_times_s.extend([now_s] * (tail + data).count(_EVENT))
        tail = data[-(len(_EVENT) - 1) :]
