"""Why a registered adapter cannot be used, beyond what the store and the loader say themselves.

    LibraryError
    ├── AdapterUnusable    it is known, and this server cannot serve it: another base, or damaged files
    ├── NotADirectory      the adapters' directory is none, or is itself an adapter
    ├── GateFailed         a version does not answer an alias's golden prompts, so the alias stays
    ├── CanaryConflict     an alias has a canary already, has none, or cannot have one as it is
    └── SourceError        an adapter cannot be fetched from where it is said to be
        ├── SourceInvalid      the text names no source
        ├── SourceForbidden    this server may not fetch from there
        ├── SourceNotFound     there is no adapter, or none that may be seen
        ├── SourceDenied       whoever keeps it wants another token
        └── SourceUnavailable  no answer, or half of one: try again

Errors of `adapters_store` (unknown name, caps, headers) and `server.loader` (refused by a decoder, loader died) pass
through unchanged; all carry a stable `code`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LibraryError(Exception):
    code: ClassVar[str] = "library_error"


class AdapterUnusable(LibraryError):
    code = "adapter_unusable"


class NotADirectory(LibraryError):
    code = "not_a_directory"


class SourceError(LibraryError):
    """No message of these ever holds a token."""

    code = "source_error"


class SourceInvalid(SourceError):
    code = "invalid_source"


class SourceForbidden(SourceError):
    code = "source_not_allowed"


class SourceNotFound(SourceError):
    code = "source_not_found"


class SourceDenied(SourceError):
    code = "source_denied"


class SourceUnavailable(SourceError):
    code = "source_unavailable"


class GateFailed(LibraryError):
    """`verdict` holds what was asked, answered and expected; None where nothing could be asked.

    `committed` is the version that a new upload became all the same (`Committed`); None where nothing was committed.
    """

    code = "gate_failed"

    def __init__(self, message: str, verdict: Any = None) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.committed: Any = None


class CanaryConflict(LibraryError):
    code = "canary_conflict"
