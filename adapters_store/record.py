"""What the store remembers of an adapter: one file per version, written once and never changed.

`to_json` is exactly what stands in `versions/<name>/<n>.json`. State and reason are no part of it: whether a version
can be served depends on the base that the store is opened for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapters_store.alias import Alias
from adapters_store.attributes import Attributes
from adapters_store.errors import StoreDamaged
from adapters_store.names import DEFAULT_ALIAS

SCHEMA = 1

JsonObject = Mapping[str, Any]


class VersionState(StrEnum):
    READY = "ready"
    INCOMPATIBLE = "incompatible"  # committed for another base; untouched, and ready again when that base returns
    FAILED = "failed"  # its bytes or its image turned out unusable


@dataclass(frozen=True, slots=True)
class StoredFile:
    path: str  # relative, "adapter_config.json"
    size: int  # bytes
    sha256: str  # 64 hex digits; also the blob's name

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes came from.

    `stamp` is whatever lets the same source be recognised as unchanged without reading it, such as sizes and
    modification times of a directory's files; empty when there is no such thing.
    """

    uri: str  # "upload:", "file:///adapters/sql"
    revision: str | None = None
    stamp: JsonObject = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"uri": self.uri, "revision": self.revision, "stamp": dict(self.stamp)}

    @classmethod
    def from_json(cls, data: JsonObject) -> Source:
        return cls(data["uri"], data["revision"], data["stamp"])


@dataclass(frozen=True, slots=True)
class Content:
    """What a commit adds to the files: everything that the store takes on trust from whoever checked them."""

    effect_digest: str  # "sha256:...": identity of the packed image and of K/V
    base_fingerprint: str
    base_model: str | None = None  # as the adapter's config names it
    report: JsonObject = field(default_factory=dict)  # the load report, opaque here


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    name: str
    version: int
    created_at: str  # RFC 3339, UTC
    manifest_digest: str  # "sha256:...": identity of the files
    files: tuple[StoredFile, ...]  # sorted by path
    source: Source
    content: Content
    state: VersionState = VersionState.READY
    reason: str | None = None  # why it is not ready

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def num_bytes(self) -> int:
        """Size of its files together."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.name,
            "version": self.version,
            "created_at": self.created_at,
            "manifest_digest": self.manifest_digest,
            "files": [file.to_json() for file in self.files],
            "source": self.source.to_json(),
            "effect_digest": self.content.effect_digest,
            "base_fingerprint": self.content.base_fingerprint,
            "base_model": self.content.base_model,
            "report": dict(self.content.report),
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> AdapterVersion:
        """Raises StoreDamaged if `data` is not what `to_json` writes."""
        if data.get("schema") != SCHEMA:
            raise StoreDamaged(f"a version of schema {data.get('schema')!r}; this program reads schema {SCHEMA}.")
        try:
            return cls(
                name=data["name"],
                version=data["version"],
                created_at=data["created_at"],
                manifest_digest=data["manifest_digest"],
                files=tuple(StoredFile(item["path"], item["size"], item["sha256"]) for item in data["files"]),
                source=Source.from_json(data["source"]),
                content=Content(data["effect_digest"], data["base_fingerprint"], data["base_model"], data["report"]),
            )
        except (KeyError, TypeError) as error:
            raise StoreDamaged(f"a version's record lacks or mistypes {error}.") from error


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One name with everything that is known under it.

    A name may have no version: a directory was found and could not be registered, and `failure` says why. With
    versions, `failure` says why its newest files are not among them.
    """

    name: str
    versions: tuple[AdapterVersion, ...] = ()  # ascending
    aliases: Mapping[str, int] = field(default_factory=dict)  # where an alias has several, the one with most weight
    failure: str | None = None
    routes: Mapping[str, Alias] = field(default_factory=dict)  # the same aliases with weights and history
    attributes: Attributes = field(default_factory=Attributes)

    @property
    def etag(self) -> str:
        """Changes whenever versions, aliases or attributes do, and with nothing else; 32 hex digits."""
        facts = [
            [[version.version, version.manifest_digest] for version in self.versions],
            {alias: route.to_json() for alias, route in self.routes.items()},
            self.attributes.to_json(),
        ]
        return hashlib.sha256(json.dumps([self.name, *facts], sort_keys=True).encode()).hexdigest()[:32]

    def is_pinned(self, version: int) -> bool:
        return self.attributes.is_pinned(version)

    @property
    def latest(self) -> AdapterVersion | None:
        return self.versions[-1] if self.versions else None

    @property
    def default(self) -> AdapterVersion | None:
        """What the bare name means; where it means nothing, for want of the alias `default`, the latest version."""
        number = self.aliases.get(DEFAULT_ALIAS)
        return next((version for version in self.versions if version.version == number), self.latest)

    @property
    def state(self) -> VersionState:
        return VersionState.FAILED if self.default is None else self.default.state

    @property
    def reason(self) -> str | None:
        """Why `state` is not ready."""
        return self.failure if self.default is None else self.default.reason

    @property
    def created_at(self) -> str | None:
        return self.versions[0].created_at if self.versions else None

    @property
    def updated_at(self) -> str | None:
        return self.versions[-1].created_at if self.versions else None


# Sees an adapter as it is (None: there is none) under the lock of a change, and raises to forbid the change.
Expectation = Callable[[AdapterRecord | None], object]


def manifest_digest(files: Iterable[StoredFile]) -> str:
    """Identity of a set of files: the order they came in does not matter, their names do."""
    lines = sorted(f"{file.path}:{file.size}:{file.sha256}\n" for file in files)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
