"""`If-Match` and `If-None-Match` on an adapter: change it only if it is still what the caller saw.

    If-None-Match: *          only if there is no such adapter     (create)
    If-Match: *               only if there is one                 (update)
    If-Match: "<etag>"        only if it is as it was when `ETag` was read

What is compared is `AdapterRecord.etag`. A precondition is held twice: at once, so that nobody sends gigabytes in
vain, and by the store under the lock of the change itself, which gets `Precondition.check` as its `expect`.

Running example: two pipelines read the tag of sql, both upload with it; the second gets 412 and looks again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapters_store.errors import PreconditionFailed
from adapters_store.record import AdapterRecord
from server.api.errors import AdminRefusal

_TAG = re.compile(r'(?:W/)?"([\x21\x23-\x2b\x2d-\x7e]*)"', re.ASCII)
ANY = "*"


def etag_header(record: AdapterRecord) -> str:
    return f'"{record.etag}"'


@dataclass(frozen=True, slots=True)
class Precondition:
    """What the caller expects of an adapter. Without headers it expects nothing."""

    if_match: str | None = None
    if_none_match: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Precondition:
        """Raises AdminRefusal (400) for a header that is neither `*` nor a list of quoted tags."""
        wanted = cls(headers.get("if-match"), headers.get("if-none-match"))
        for text in (wanted.if_match, wanted.if_none_match):
            if text is not None:
                _tags(text)
        return wanted

    def check(self, record: AdapterRecord | None) -> None:
        """`record` is None for an unknown adapter. Raises PreconditionFailed."""
        known = record if record is not None and record.versions else None
        if self.if_match is not None:
            _check_match(known, _tags(self.if_match))
        if self.if_none_match is not None and known is not None:
            _check_none_match(known, _tags(self.if_none_match))


def _check_match(known: AdapterRecord | None, tags: list[str] | None) -> None:
    if known is None:
        raise PreconditionFailed("there is no such adapter, and `If-Match` is about one that exists.")
    if tags is not None and known.etag not in tags:
        raise PreconditionFailed(
            f"adapter {known.name!r} has been changed: its tag is {etag_header(known)} now. Look at it again."
        )


def _check_none_match(known: AdapterRecord, tags: list[str] | None) -> None:
    if tags is None:
        raise PreconditionFailed(f"adapter {known.name!r} exists, and `If-None-Match: *` is about one that does not.")
    if known.etag in tags:
        raise PreconditionFailed(f"adapter {known.name!r} still has the tag that `If-None-Match` excludes.")


def _tags(text: str) -> list[str] | None:
    """The tags of a header without their quotes; None for `*`. A weak one is as good: our tags are exact."""
    if text.strip() == ANY:
        return None
    matches = [_TAG.fullmatch(part.strip()) for part in text.split(",")]
    found = [match[1] for match in matches if match is not None]
    if len(found) != len(matches):
        raise AdminRefusal(400, "invalid_precondition", f"{text[:100]!r} is neither * nor a list of quoted tags")
    return found
