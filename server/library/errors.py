"""Why a registered adapter cannot be used, beyond what the store and the loader say themselves.

    LibraryError
    ├── AdapterUnusable    it is known, and this server cannot serve it: another base, or damaged files
    └── NotADirectory      the adapters' directory is none, or is itself an adapter

Errors of `adapters_store` (unknown name, caps, headers) and `server.loader` (refused by a decoder, loader died) pass
through unchanged; all carry a stable `code`.
"""

from __future__ import annotations

from typing import ClassVar


class LibraryError(Exception):
    code: ClassVar[str] = "library_error"


class AdapterUnusable(LibraryError):
    code = "adapter_unusable"


class NotADirectory(LibraryError):
    code = "not_a_directory"
