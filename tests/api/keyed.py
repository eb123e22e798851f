"""Keys files whose keys tests know: the key of NAME is `key-of-NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.keys import KeyRecord, add_key, digest_of


def make_keys(path: Path, **keys: dict[str, Any]) -> Path:
    """A keys file; the key of NAME is `key-of-NAME`."""
    for name, fields in keys.items():
        values = {"scopes": ["generate"], **fields}
        record = {"name": name, "sha256": digest_of(f"key-of-{name}"), "created_at": "2026-11-25T12:00:00Z", **values}
        add_key(path, KeyRecord.model_validate(record))
    return path


def read(path: Path) -> str:
    return path.read_text()


def write(path: Path, text: str | None) -> None:
    """Another content for a keys file, or no file."""
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def of(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}
