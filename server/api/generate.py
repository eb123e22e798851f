"""The native routes: `POST /generate`, `/generate_stream` and `/`.

    /generate          an object; server-sent events when the body says `stream: true`
    /generate_stream   server-sent events
    /                  as /generate, but an answer that is not streamed is an array of one object

A request that fails before its first token gets a real status; after that an `error` event ends the stream.
No `[DONE]` is ever sent here: clients of this dialect would choke on it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import Body, Request, Response
from fastapi.responses import JSONResponse

from server.api import unknown
from server.api.caller import caller_of
from server.api.documented import GENERATION, Responses
from server.api.errors import BUG, error_body, explain, log
from server.api.guarded_route import guarded_router
from server.api.native_body import Answer, Shape
from server.api.passage import Passage
from server.api.sampling import STICKY_HEADER, text_request, wants_details
from server.api.schemas import GenerateReply, GenerateRequest, Parameters
from server.api.service import Service
from server.api.sse import EventStream, event, while_connected
from server.front.text import TextDelta

router = guarded_router(tags=["Generate"])
_EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON: a token, or an error"}}}
_STREAM = {"text/event-stream": {"schema": _EVENT, "example": 'data: {"index":1,"token":{...}}\n\n'}}
_RESPONSES: Responses = {
    **GENERATION,
    200: {"description": "The answer, or its stream.", "model": GenerateReply, "content": _STREAM},
}
_ROOT_RESPONSES: Responses = {**_RESPONSES, 200: {**_RESPONSES[200], "model": list[GenerateReply]}}
_Generate = Annotated[GenerateRequest, Body()]


@router.post("/generate", summary="Continue a prompt", responses=_RESPONSES)
async def generate(body: _Generate, request: Request) -> Response:
    """The base model, or the adapter that `adapter` names, continues `inputs`."""
    return await _answer(request, body, is_stream=bool(body.stream))


@router.post("/generate_stream", summary="Continue a prompt, token by token", responses=_RESPONSES)
async def generate_stream(body: _Generate, request: Request) -> Response:
    """As /generate with `stream: true`."""
    return await _answer(request, body, is_stream=True)


@router.post("/", summary="Continue a prompt, at the address that clients post to", responses=_ROOT_RESPONSES)
async def generate_at_root(body: _Generate, request: Request) -> Response:
    """As /generate, but an answer that is not streamed comes as an array of one object."""
    return await _answer(request, body, is_stream=bool(body.stream), is_array=True)


async def _answer(request: Request, body: GenerateRequest, *, is_stream: bool, is_array: bool = False) -> Response:
    service: Service = request.app.state.service
    ignored = unknown.judge(body, "parameters", Parameters)
    sticky = request.headers.get(STICKY_HEADER)
    asked = text_request(body, service.settings, is_stream=is_stream, sticky_header=sticky)
    headers = {"x-compute-characters": str(len(body.inputs))}
    if ignored:
        service.metrics.ignored_fields.inc(len(ignored))
        headers[unknown.IGNORED_FIELDS_HEADER] = unknown.header_value(ignored)
    passage = Passage(service, asked, request.state.arrived_s, caller_of(request))
    shape = Shape(
        body.parameters,
        is_greedy=asked.params.temperature == 0,
        has_details=wants_details(body.parameters),
    )
    if is_stream:
        return await _streamed(request, passage, shape, headers)
    answers = await while_connected(request, _collected(passage))
    reply = shape.reply(answers)
    return JSONResponse([reply] if is_array else reply, headers=headers | passage.headers() | passage.timing_headers())


async def _collected(passage: Passage) -> AsyncGenerator[list[Answer], None]:
    answers = [Answer() for _ in range(passage.asked.num_sequences)]
    async with aclosing(passage.deltas()) as deltas:
        async for delta in deltas:
            answers[delta.sequence].add(delta)
    yield answers


async def _streamed(request: Request, passage: Passage, shape: Shape, headers: dict[str, str]) -> Response:
    settings = passage.service.settings
    deltas = passage.deltas()
    first: TextDelta | None = await while_connected(request, deltas)
    assert first is not None, "a generation ends with a finish, so it has a first delta"
    return EventStream(
        _events(shape, first, deltas),
        deltas,
        headers=headers | passage.headers(),
        keep_alive_s=settings.keep_alive_s,
        stall_s=settings.stalled_client_s,
    )


async def _events(shape: Shape, first: TextDelta, rest: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[bytes, None]:
    """Events by delta; several tokens that came at once go out in one write."""
    num_sent = len(first.tokens)
    try:
        yield shape.events(first, 0)
        async for delta in rest:
            if delta.tokens or delta.finish is not None:
                yield shape.events(delta, num_sent)
                num_sent += len(delta.tokens)
    except Exception as error:  # the status is sent: the failure must travel as an event
        told = explain(error)
        if told is None:
            log.error("a stream failed", exc_info=error)
            told = BUG
        yield event({**error_body("/", told), "error_type": _stream_type(told.error_type)})


def _stream_type(error_type: str) -> str:
    return "incomplete_generation_stream" if error_type == BUG.error_type else error_type
