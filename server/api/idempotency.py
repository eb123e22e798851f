"""`Idempotency-Key` on requests that change something: whoever lost the answer asks again, and nothing is done twice.

    Idempotency-Key: deploy-7     the first time     it is carried out
                                  again              the answer of the first, with `idempotent-replayed: true`
                                  another request    422 idempotency_key_reused
                                  still under way    409 idempotency_in_progress, in whatever process of the store

Kept for a day, in the store, is what succeeded; a request that was refused may be put right and sent with the same key.
The same request is the same caller, method, address, preconditions and body; what stands between the parts of a
multipart body does not matter, for clients draw it anew. An answer that names an operation counts as long as the
operation is known: after a restart of the server the work is begun again.

A process that dies between a change and its answer has kept none: sent again, the request is carried out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from adapters_store.answers import Answer, AnswerBook
from adapters_store.errors import DiskFull
from adapters_store.locks import Claim
from server.api.caller import caller_of
from server.api.errors import AdminRefusal
from server.library.obtain import obtain

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_OPERATION = re.compile(r"/admin/v1/operations/([A-Za-z0-9_]+)")
_NOT_KEPT = ("content-length", "x-request-id")
_INLINE_BYTES = 16 * 1024  # hashed in the event loop; more than that in a thread
log = logging.getLogger("veneer.http")


async def once(request: Request, carry_out: Callable[[Request], Awaitable[Response]]) -> Response:
    """Carries the request out, or tells again what was answered to it before.

    Raises AdminRefusal: the key is none, is being used, or was used for something else; and what `carry_out` raises.
    """
    book: AnswerBook = request.app.state.service.answers
    key = _place_of(request)
    claim = await obtain(lambda: book.claim(key), _release)
    if claim is None:
        raise InProgress
    try:
        body = DigestedBody(request.receive, _boundary_of(request))
        known = await asyncio.to_thread(book.find, key)
        if known is not None and _is_still_known(request, known):
            return await _told_again(request, body, known)
        response = await carry_out(Request(request.scope, body))
        if 200 <= response.status_code < 300:
            await _keep(request, body, response, key)
        return response
    finally:
        claim.release()


class InProgress(AdminRefusal):
    def __init__(self) -> None:
        super().__init__(409, "idempotency_in_progress", "a request with this Idempotency-Key is still under way")
        self.headers = {"Retry-After": "1"}


class DigestedBody:
    """An ASGI `receive` that digests the body as it passes. Between the parts of a multipart one counts no boundary."""

    def __init__(self, receive: Receive, boundary: bytes = b"") -> None:
        self.is_complete = False
        self._receive = receive
        self._delimiter = b"--" + boundary if boundary else b""
        self._tail = b""  # in which a delimiter may have begun
        self._hash = hashlib.sha256()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            piece = message.get("body", b"")
            if len(piece) <= _INLINE_BYTES:
                self._update(piece)
            else:
                await asyncio.to_thread(self._update, piece)
            self.is_complete = not message.get("more_body", False)
        return message

    async def drain(self, stall_s: float, total_s: float) -> None:
        """Takes in what is left. Raises AdminRefusal when it comes too slowly, ClientDisconnect."""
        try:
            async with asyncio.timeout(total_s):
                while not self.is_complete:
                    message = await asyncio.wait_for(self(), stall_s)
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
        except TimeoutError:
            raise AdminRefusal(408, "upload_stalled", "the body did not arrive in time") from None

    def hexdigest(self) -> str:
        """Of what has passed."""
        whole = self._hash.copy()
        whole.update(self._tail)
        return whole.hexdigest()

    def _update(self, piece: bytes) -> None:
        if not self._delimiter:
            self._hash.update(piece)
            return
        data = (self._tail + piece).replace(self._delimiter, b"\0")
        cut = max(0, len(data) - len(self._delimiter) + 1)
        self._hash.update(data[:cut])
        self._tail = data[cut:]


async def _told_again(request: Request, body: DigestedBody, known: Answer) -> Response:
    settings = request.app.state.service.settings
    reused = AdminRefusal(
        422, "idempotency_key_reused", "this Idempotency-Key came with another request before; take another key"
    )
    if known.head != _head_of(request):
        raise reused
    await body.drain(settings.stalled_client_s, settings.upload_timeout_s)
    if known.body != body.hexdigest():
        raise reused
    return Response(known.content, known.status, {**known.headers, REPLAYED: "true"})


async def _keep(request: Request, body: DigestedBody, response: Response, key: str) -> None:
    """The change has happened, so an answer that cannot be kept stops nothing; it is told as an error."""
    service = request.app.state.service
    with contextlib.suppress(AdminRefusal, ClientDisconnect):  # a body that nobody wanted may not come at all
        await body.drain(service.settings.stalled_client_s, service.settings.stalled_client_s)
    headers = {name: value for name, value in response.headers.items() if name not in _NOT_KEPT}
    answer = Answer(_head_of(request), body.hexdigest(), response.status_code, headers, bytes(response.body))
    try:
        await asyncio.to_thread(service.answers.keep, key, answer)
    except (OSError, DiskFull) as error:
        log.error("the answer to %s %s could not be kept: %s", request.method, request.url.path, error)


def _is_still_known(request: Request, known: Answer) -> bool:
    """False for work in the background of which this process knows nothing (any more)."""
    if known.status != 202:
        return True
    match = _OPERATION.fullmatch(known.headers.get("location", ""))
    return match is not None and request.app.state.service.operations.knows(match[1])


def _place_of(request: Request) -> str:
    """Where the answer is kept: another caller, or the same one with other scopes, is another place."""
    key = request.headers[HEADER]
    if not _KEY.fullmatch(key):
        text = "an Idempotency-Key is 1 to 255 printable characters without spaces"
        raise AdminRefusal(422, "invalid_idempotency_key", text)
    caller = caller_of(request)
    return _digest([caller.name, caller.tenant, sorted(caller.scopes), sorted(caller.adapters), key])


def _head_of(request: Request) -> str:
    """Digest of everything that the request says but its body."""
    headers = [request.headers.get(name) for name in ("if-match", "if-none-match", "content-encoding")]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query = sorted(request.query_params.multi_items())
    return _digest([request.method, request.url.path, query, kind, headers])


def _digest(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _boundary_of(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    return options.get(b"boundary", b"") if kind == b"multipart/form-data" else b""


def _release(claim: Claim | None) -> None:
    if claim is not None:
        claim.release()
