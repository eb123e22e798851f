"""The body of an upload while it arrives: paced, bounded in time, held against the digests that its headers announce.

    Content-Length                  too much for this server, or for its disk, is refused before the first byte
    Repr-Digest, Content-Digest     sha-256=:BASE64:   (RFC 9530)
    Digest                          sha-256=BASE64     (its predecessor)

Hashing and writing happen in a thread, so an upload of gigabytes does not hold up the streams next to it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi import Request

from adapters_store.errors import DigestMismatch
from adapters_store.staging import Stage
from server.api.errors import AdminRefusal
from server.settings import Settings

FRAME_BYTES = 2**20  # what stands around the files at most: boundaries, headers and metadata
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
_STRUCTURED = re.compile(r":([A-Za-z0-9+/=]*):", re.ASCII)


class AnnouncedDigests:
    """The digests of the whole body that a request announces."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """Raises AdminRefusal (400) for a header that cannot be read or names other algorithms only."""
        self._expected: list[tuple[str, bytes]] = []  # (hashlib's name, digest)
        for header in ("repr-digest", "content-digest", "digest"):
            if header in headers:
                self._expected += _read_digests(header, headers[header])
        self._hashes = {name: hashlib.new(name) for name, _ in self._expected}

    def update(self, chunk: bytes) -> None:
        for found in self._hashes.values():
            found.update(chunk)

    def check(self) -> None:
        """After the last byte. Raises DigestMismatch."""
        for name, expected in self._expected:
            found = self._hashes[name].digest()
            if found != expected:
                raise DigestMismatch(f"the body received has {name} {found.hex()}, announced was {expected.hex()}.")


async def take_body(request: Request, stage: Stage, take: Callable[[bytes], None], settings: Settings) -> None:
    """Hands the body on piece by piece; `take` is called in another thread, one call at a time.

    Raises:
        AdminRefusal: it is too large, or nothing arrived for too long, or it took too long in all.
        DiskFull, StagingFull, DigestMismatch, and what `take` raises.
        ClientDisconnect: the caller left.
    """
    digests = AnnouncedDigests(request.headers)
    num_bytes = announced_bytes(request)
    if num_bytes > settings.max_upload_bytes + FRAME_BYTES:
        raise AdminRefusal(
            413, "too_large", f"the body has {num_bytes} bytes; the limit of uploads is {settings.max_upload_bytes}"
        )
    await asyncio.to_thread(stage.announce, num_bytes)

    def take_one(chunk: bytes) -> None:
        digests.update(chunk)
        take(chunk)

    async for chunk in _paced(request, settings.stalled_client_s, settings.upload_timeout_s):
        await asyncio.to_thread(take_one, chunk)
    digests.check()


def announced_bytes(request: Request) -> int:
    """Content-Length; 0 where there is none, or none that can be read."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


async def _paced(request: Request, stall_s: float, total_s: float) -> AsyncIterator[bytes]:
    clock = asyncio.get_running_loop().time
    deadline = clock() + total_s
    pieces: AsyncIterator[bytes] = request.stream()
    while True:
        left_s = deadline - clock()
        try:
            chunk = await asyncio.wait_for(anext(pieces, None), max(0.0, min(stall_s, left_s)))
        except TimeoutError:
            if left_s <= stall_s:
                raise AdminRefusal(
                    408, "upload_too_slow", f"the upload was not complete after {total_s:g} s and is dropped"
                ) from None
            raise AdminRefusal(
                408, "upload_stalled", f"nothing arrived for {stall_s:g} s; the upload is dropped"
            ) from None
        if chunk is None:
            return
        if chunk:
            yield chunk


def _read_digests(header: str, text: str) -> list[tuple[str, bytes]]:
    found = []
    for part in text.split(","):
        algorithm, _, value = part.strip().partition("=")
        name = _ALGORITHMS.get(algorithm.lower())
        if name is not None:
            found.append((name, _decode(header, value)))
    if not found:
        raise AdminRefusal(400, "invalid_digest", f"`{header}` names none of {', '.join(_ALGORITHMS)}")
    return found


def _decode(header: str, value: str) -> bytes:
    match = _STRUCTURED.fullmatch(value)
    try:
        return base64.b64decode(match[1] if match else value, validate=True)
    except (binascii.Error, ValueError):
        raise AdminRefusal(400, "invalid_digest", f"`{header}` holds {value[:100]!r}, which is not base64") from None
