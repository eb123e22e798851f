"""Reading an uploaded adapter: a multipart body, streamed part by part into a stage of the store.

    metadata   one JSON part, first
    files      one part per file; its filename is the file's path inside the adapter

Nothing is held in memory but the metadata and the piece that just arrived. Which files an adapter may have, and how
large they may be, the stage knows.

Running example:
    curl -F 'metadata={"name": "pirate"}' -F files=@adapter_config.json -F files=@adapter_model.safetensors URL
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters_store.pending import PendingFiles, parse_digest
from adapters_store.staging import FileSink, Stage
from server.api.errors import AdminRefusal
from server.api.upload_body import take_body
from server.api.upload_order import wanted_aliases
from server.settings import Settings

MAX_METADATA_BYTES = 64 * 1024
_MAX_PARTS = 64
_METADATA, _FILES = "metadata", "files"


class AnnouncedFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    path: str
    sha256: Annotated[str, StringConstraints(pattern=r"^(sha256:)?[0-9a-fA-F]{64}$")]


class UploadMetadata(BaseModel):
    """The first part of an upload."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={"examples": [{"name": "pirate"}, {"name": "sql", "alias": "prod"}]},
    )

    name: str = Field(description="The adapter's name; a known one gets a new version.")
    alias: str | None = Field(None, description="An alias to point to the new version, besides `default`.")
    promote: bool = Field(True, description="Whether the bare name means the new version from now on.")
    if_exists: Literal["new_version", "error"] = "new_version"
    files: list[AnnouncedFile] = Field(
        [], description="Digests to hold the received files against; of a file that is not sent, its blob is taken."
    )

    @property
    def aliases(self) -> tuple[str, ...]:
        """The aliases that move to the new version. Raises InvalidName."""
        return wanted_aliases(self.name, self.alias, self.promote)


OnMetadata = Callable[[UploadMetadata], None]


class UploadForm(BaseModel):
    """The multipart body, for the OpenAPI document."""

    metadata: UploadMetadata
    files: list[Annotated[str, Field(json_schema_extra={"format": "binary"})]]


class Received:
    """A multipart body while it arrives. `feed` may be called from another thread, one call at a time."""

    def __init__(self, stage: Stage, boundary: bytes, on_metadata: OnMetadata, pending: PendingFiles | None) -> None:
        """`on_metadata` hears of the metadata before any file is taken, and raises to refuse it.

        Announced files that do not come are taken from `pending`, where the caller may.
        """
        self.num_bytes = 0
        self._on_metadata = on_metadata
        self._pending = pending
        self._stage = stage
        self._metadata_bytes = bytearray()
        self._metadata: UploadMetadata | None = None
        self.aliases: tuple[str, ...] = ()
        self._sink: FileSink | None = None
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._num_parts = 0
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open_part,
                "on_part_data": self._take,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Raises AdminRefusal, or what the stage raises."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _malformed(str(error)) from None

    @property
    def metadata(self) -> UploadMetadata:
        """Raises AdminRefusal unless the body is complete and began with its metadata."""
        if not self._is_complete:
            raise _malformed("it ends before its closing boundary")
        if self._metadata is None:
            raise _invalid('the metadata part is missing; send `metadata` first, e.g. {"name": "pirate"}')
        return self._metadata

    def _begin_part(self) -> None:
        self._num_parts += 1
        self._disposition = b""
        if self._num_parts > _MAX_PARTS:
            raise _invalid(f"more than {_MAX_PARTS} parts; an adapter needs fewer")

    def _end_header(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == _METADATA:
            if self._num_parts > 1:
                raise _invalid("`metadata` must be the first part, so that a refusal comes before the files")
            return
        if name != _FILES:
            raise _invalid(f"unknown part {name[:80]!r}; send `metadata` first, then each file as `files`")
        if self._metadata is None:
            raise _invalid('the first part must be `metadata`, e.g. {"name": "pirate"}')
        path = options.get(b"filename", b"").decode("utf-8", "replace")
        self._sink = self._stage.open_file(path, sha256=self._announced(path))

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self.num_bytes += end - start
            self._sink.write(data[start:end])
            return
        self._metadata_bytes.extend(data[start:end])
        if len(self._metadata_bytes) > MAX_METADATA_BYTES:
            raise AdminRefusal(413, "too_large", f"the metadata part is larger than {MAX_METADATA_BYTES} bytes")

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.finish()
            self._sink = None
            return
        try:
            self._metadata = UploadMetadata.model_validate_json(bytes(self._metadata_bytes))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in ("metadata", *problem["loc"]))
            if problem["type"] == "extra_forbidden":
                known = ", ".join(UploadMetadata.model_fields)
                raise _invalid(f"unknown field `{where}`; there are {known}") from None
            raise _invalid(f"{where}: {problem['msg']}") from None
        self.aliases = self._metadata.aliases  # a bad name is refused here, before any file is taken
        self._on_metadata(self._metadata)

    def _end(self) -> None:
        self._is_complete = True
        received = {file.path for file in self._stage.files}
        for file in [] if self._metadata is None else self._metadata.files:
            if file.path not in received:
                self._take_pending(file.path, file.sha256.lower())

    def _take_pending(self, path: str, digest: str) -> None:
        if self._pending is None:
            raise _invalid(f"{path[:200]!r} is announced and was not sent")
        self._pending.name(self._stage, path, parse_digest(digest))

    def _announced(self, path: str) -> str | None:
        assert self._metadata is not None
        digests = {file.path: file.sha256.removeprefix("sha256:") for file in self._metadata.files}
        return digests.get(path)


async def receive(
    request: Request, stage: Stage, settings: Settings, on_metadata: OnMetadata, pending: PendingFiles | None
) -> Received:
    """Read the whole body into the stage.

    Raises:
        AdminRefusal: not a multipart body, a part that should not be there, or it came too slowly.
        UploadRefused, DiskFull: the store's own reasons; and what `on_metadata` raises.
        ClientDisconnect: the caller left.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
        raise AdminRefusal(
            415,
            "unsupported_media_type",
            "send the adapter as multipart/form-data: a `metadata` part with JSON, then one `files` part per file",
        )
    received = Received(stage, boundary, on_metadata, pending)
    await take_body(request, stage, received.feed, settings)
    return received


def _malformed(reason: str) -> AdminRefusal:
    return AdminRefusal(400, "malformed_multipart", f"the body is no complete multipart/form-data: {reason}")


def _invalid(reason: str) -> AdminRefusal:
    return AdminRefusal(422, "invalid_upload", reason)
