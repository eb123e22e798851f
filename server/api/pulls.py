"""The JSON body of `POST /admin/v1/adapters`: an adapter that the server fetches itself, as work in the background.

    {"name": "sql", "source": {"uri": "hf://org/sql-lora@v2", "token": "hf_..."}, "alias": "prod", "preload": "gpu"}
    {"name": "sql", "source": {"files": {"adapter_config.json": "sha256:...", ...}}}        blobs that were sent

202 with the operation to follow; with `?wait=60` the version itself, if it is there by then, and the refusal of the
work, if it failed. What can be refused without asking the source is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from adapters_store.attributes import Attributes, check_attributes
from adapters_store.catalog import Committed
from adapters_store.pending import PendingFiles, parse_digest
from adapters_store.record import AdapterVersion, Source
from adapters_store.staging import Stage, check_path
from server.api.adapter_view import residents_of, view_version
from server.api.audit import unchanged
from server.api.caller import caller_of
from server.api.errors import AdminRefusal, Explanation, error_response
from server.api.operation import Operation
from server.api.operations import accepted
from server.api.preconditions import Precondition
from server.api.service import Service
from server.api.upload_order import check_known, check_stage, wanted_aliases
from server.engine.request import Tier
from server.library.errors import GateFailed, SourceForbidden
from server.library.obtain import open_stage
from server.library.sources.download import Fetched, Phase, Progress

MAX_BODY_BYTES = 64 * 1024
_TIERS = {"cpu": Tier.HOST, "gpu": Tier.DEVICE}
CANCELLED = Explanation(409, "cancelled", "the operation was cancelled", "cancelled", {})


class PullSource(BaseModel):
    model_config = ConfigDict(extra="forbid")

    uri: str | None = Field(
        None,
        description="org/repo[@revision][#folder], hf://, huggingface://, s3://, gs://, https://, file:// or a path.",
    )
    files: dict[str, str] | None = Field(
        None, min_length=1, description="Instead of a uri: path -> digest of a blob that was sent."
    )
    token: SecretStr | None = Field(None, description="For this fetch alone, from the Hub or by https.")

    @model_validator(mode="after")
    def _is_one_source(self) -> PullSource:
        if (self.uri is None) == (self.files is None):
            raise ValueError("give either uri or files")
        if self.files is not None and self.token is not None:
            raise ValueError("a token is for a uri")
        return self


class PullOrder(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "sql", "source": {"uri": "hf://org/sql-lora"}}]}
    )

    name: str = Field(description="The adapter's name; a known one gets a new version.")
    source: PullSource
    alias: str | None = Field(None, description="An alias to point to the new version, besides `default`.")
    promote: bool = Field(True, strict=True, description="Whether the bare name means the new version from now on.")
    if_exists: Literal["new_version", "error"] = "new_version"
    labels: dict[str, str] | None = Field(None, description="Added to those that the adapter has.")
    pinned: bool | None = Field(None, strict=True, description="Whether the adapter stays in memory; null: as it is.")
    preload: Literal["none", "cpu", "gpu"] = Field("none", description="Where to bring it once it is committed.")


class Pull:
    """One order while it is carried out."""

    def __init__(self, request: Request, order: PullOrder, *, is_dry_run: bool) -> None:
        """Raises what can be refused at once: names, scopes, expectations, sources that are closed."""
        service: Service = request.app.state.service
        caller = caller_of(request)
        self.order = order
        self._front = service.front
        self._is_dry_run = is_dry_run
        self._is_trusted = caller.sees_all
        self._token = None if order.source.token is None else order.source.token.get_secret_value()
        self._aliases = wanted_aliases(order.name, order.alias, order.promote)
        self._precondition = Precondition.of(request.headers)
        self._create_only = order.if_exists == "error"
        self._changes = Attributes(labels=order.labels or {}, pinned=bool(order.pinned))
        caller.require(order.name)
        check_attributes(self._changes)
        check_known(self._front.library, order.name, self._precondition, create_only=self._create_only)
        self._check_source(order.source)
        self.was_created = False

    async def work(self, operation: Operation) -> Mapping[str, Any]:
        """The result is the version, or of a dry run the load report."""

        def tell(num_bytes: int, total: int | None, phase: Phase) -> None:
            if operation.status != phase:
                operation.enter(phase)
            operation.advance(num_bytes, total)
            if phase == "validating" and not self._is_dry_run:
                operation.seal()  # the commit runs to its end

        async with self._fetched(tell) as fetched:
            num_bytes = sum(file.size for file in fetched.stage.files)
            tell(num_bytes, num_bytes, "validating")
            if self._is_dry_run:
                return (await check_stage(self._front, fetched.stage, self.order.name)).model_dump(mode="json")
            committed = await self._commit(fetched, operation)
        self.was_created = committed.created
        await self._finish(committed.version, operation)
        return view_version(self._front, committed.version, await residents_of(self._front)).model_dump(mode="json")

    async def _commit(self, fetched: Fetched, operation: Operation) -> Committed:
        """Raises as `Library.add`. What was committed is noted, also where an alias could not be moved to it."""
        try:
            committed = await self._front.library.add(
                fetched.stage,
                self.order.name,
                source=fetched.source,
                aliases=self._aliases,
                create_only=self._create_only,
                expect=self._precondition.check,
            )
        except GateFailed as error:
            if error.committed is not None:
                _note(operation, error.committed)
            raise
        _note(operation, committed)
        return committed

    def _check_source(self, source: PullSource) -> None:
        """Raises SourceInvalid, SourceForbidden, InvalidName, FileRefused."""
        if source.uri is not None:
            self._front.puller.check(source.uri, self._token, is_trusted=self._is_trusted)
            return
        if not self._is_trusted:
            raise SourceForbidden("this key is bound to adapters, and blobs are not. Upload the files themselves.")
        for path, digest in (source.files or {}).items():
            check_path(path)
            parse_digest(digest)

    @asynccontextmanager
    async def _fetched(self, tell: Progress) -> AsyncIterator[Fetched]:
        """The files, wherever they come from, in a stage that goes when the block ends."""
        uri = self.order.source.uri
        if uri is None:
            async with open_stage(self._front.library.stage) as stage:
                await asyncio.to_thread(self._name_blobs, stage)
                yield Fetched(stage, Source("upload:"))
            return
        async with self._front.puller.fetched(
            uri, token=self._token, is_trusted=self._is_trusted, progress=tell
        ) as fetched:
            yield fetched

    def _name_blobs(self, stage: Stage) -> None:
        pending = PendingFiles(self._front.library.catalog.root)
        for path, digest in (self.order.source.files or {}).items():
            pending.name(stage, path, parse_digest(digest))

    async def _finish(self, version: AdapterVersion, operation: Operation) -> None:
        """What is said of the adapter, and where its version is wanted. The version is committed whatever comes."""
        order = self.order
        if order.labels is not None or order.pinned is not None:
            await asyncio.to_thread(self._front.library.catalog.amend, order.name, self._amended)
            await self._front.library.pins.apply(order.name)
        if order.preload != "none":
            operation.enter("loading")
            with await self._front.library.resolve(str(version)) as lease:
                await self._front.engine.load(lease.ticket, _TIERS[order.preload])

    def _amended(self, known: Attributes) -> Attributes:
        pinned = known.pinned if self.order.pinned is None else self.order.pinned
        return replace(known, labels={**known.labels, **self._changes.labels}, pinned=pinned)


def _note(operation: Operation, committed: Committed) -> None:
    version = committed.version
    facts = {"created": committed.created, "source": version.source.uri, "revision": version.source.revision}
    operation.note(version=version.version, **facts)


async def start_pull(request: Request, *, is_dry_run: bool, wait_s: float) -> Response:
    """Carries the request's order out. Raises AdminRefusal and what `Pull` raises."""
    service: Service = request.app.state.service
    pull = Pull(request, await _read(request), is_dry_run=is_dry_run)
    unchanged(request)  # the operation has its own line in the audit log
    operation = service.operations.start(
        "adapter.check" if is_dry_run else "adapter.register",
        pull.order.name,
        pull.work,
        actor=caller_of(request).name or "no key",
        is_change=not is_dry_run,
    )
    if wait_s <= 0 or not await operation.wait(wait_s):
        return accepted(operation)
    if operation.result is None:
        told = operation.error or CANCELLED
        return error_response(request.url.path, told)
    status = 201 if pull.was_created else 200
    answer = JSONResponse(dict(operation.result), status)
    if not is_dry_run:
        name, version = operation.result["name"], operation.result["version"]
        answer.headers["location"] = f"/admin/v1/adapters/{name}/versions/{version}"
    return answer


def is_order(request: Request) -> bool:
    """Whether the body is JSON, and so names a source."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _read(request: Request) -> PullOrder:
    """The body, which is small. Raises AdminRefusal."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise AdminRefusal(413, "too_large", f"an order has at most {MAX_BODY_BYTES} bytes")
    try:
        return PullOrder.model_validate_json(bytes(body))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(PullOrder.model_fields)
            raise AdminRefusal(422, "invalid_order", f"unknown field `{where[:120]}`; there are {known}") from None
        raise AdminRefusal(422, "invalid_order", f"`{where[:120]}`: {problem['msg'][:200]}") from None
