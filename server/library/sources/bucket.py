"""Buckets of object stores, through fsspec: `s3://` with the extra `s3`, `gs://` with the extra `gcs`.

Address and credentials are the server's own, from where those libraries look for them: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, FSSPEC_S3_ANON, GOOGLE_APPLICATION_CREDENTIALS, the machine's role. A folder of a bucket has no
revision, so the entity tags of its files are recorded, and looked at again at the end: files that were replaced
while they were read belong to no version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec

from adapters_store.record import Source
from server.library.errors import SourceDenied, SourceError, SourceForbidden, SourceNotFound, SourceUnavailable
from server.library.sources.listing import CHUNK_BYTES, Listing, SourceFile, choose_files
from server.library.sources.reference import Scheme, SourceReference

_BLOCK_BYTES = 8 << 20  # one request of the object store each
_EXTRAS = {Scheme.S3: "s3", Scheme.GS: "gcs"}
_TAGS = ("ETag", "etag", "VersionId", "generation")


class BucketSource:
    def __init__(self, reference: SourceReference) -> None:
        """Raises SourceForbidden where the library for this kind of bucket is not installed."""
        self._reference = reference
        try:
            self._files: Any = fsspec.filesystem(
                str(reference.scheme), use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            extra = _EXTRAS[reference.scheme]
            raise SourceForbidden(
                f"{reference.scheme}:// needs a library that is not installed. Install `veneer[{extra}]` on the server."
            ) from error
        self._stamp: dict[str, list[Any]] = {}

    def list_files(self) -> Listing:
        """Raises SourceError, FileRefused."""
        found = self._look()
        files = choose_files((file for file, _ in found.values()), str(self._reference))
        self._stamp = {file.name: found[file.name][1] for file in files}
        return Listing(files, Source(str(self._reference), None, dict(self._stamp)))

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """Raises SourceError; also where the folder is not any more what was listed."""
        try:
            with self._files.open(file.key, "rb", block_size=_BLOCK_BYTES) as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    yield chunk
        except Exception as error:
            raise self._explained(error) from error
        now = self._look().get(file.name)
        if now is None or now[1] != self._stamp[file.name]:
            raise SourceUnavailable(f"{file.name} of {self._reference} was replaced while it was read; try again.")

    def _look(self) -> dict[str, tuple[SourceFile, list[Any]]]:
        """Name -> the file and what would change if it were replaced."""
        try:
            entries = self._files.ls(self._reference.place, detail=True, refresh=True)
        except Exception as error:
            raise self._explained(error) from error
        found = {}
        for entry in entries:
            parent, _, name = str(entry["name"]).rpartition("/")
            if entry["type"] == "file" and name and parent == self._reference.place:
                tags = [str(entry[tag]) for tag in _TAGS if entry.get(tag)]
                found[name] = SourceFile(name, str(entry["name"]), int(entry["size"])), [int(entry["size"]), *tags]
        return found

    def _explained(self, error: Exception) -> SourceError:
        """The libraries raise what they like; their texts may hold keys, so that only the class is told."""
        if isinstance(error, SourceError):
            return error
        if isinstance(error, FileNotFoundError):
            return SourceNotFound(f"there is nothing at {self._reference}.")
        if isinstance(error, PermissionError):
            return SourceDenied(f"the server's credentials may not read {self._reference}.")
        return SourceUnavailable(f"{self._reference} cannot be read ({type(error).__name__}); try again later.")
