"""One upload of the corpus: a whole HTTP request, and the answer it must get.

On the disk it is a line of `corpus.json` and a file of `members/`; `make_corpus.py` writes both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
TARGET = "/admin/v1/adapters/victim"
FORM_TARGET = "/admin/v1/adapters"
FORM_TYPE = "multipart/form-data; boundary=corpus"

Pace = Literal["at once", "stalls", "drips", "leaves"]


@dataclass(frozen=True)
class HostileMember:
    """Without `code` no answer is expected: the caller is gone."""

    name: str
    status: int | None
    code: str | None
    body: bytes
    method: str = "PUT"
    path: str = TARGET
    headers: Mapping[str, str] = field(default_factory=dict)
    pace: Pace = "at once"  # after the body: waits for the answer, goes on slowly for ever, or hangs up

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "code": self.code,
            "method": self.method,
            "path": self.path,
            "headers": dict(self.headers),
            "pace": self.pace,
            "body": f"members/{self.name}.bin",
        }


def archive(name: str, code: str, body: bytes, status: int = 422, **options: Any) -> HostileMember:
    return HostileMember(name, status, code, body, **options)


def upload(name: str, code: str, body: bytes, status: int = 422, **options: Any) -> HostileMember:
    """A multipart body."""
    headers = {"Content-Type": FORM_TYPE, **options.pop("headers", {})}
    return HostileMember(name, status, code, body, "POST", FORM_TARGET, headers, **options)


def read_corpus() -> list[HostileMember]:
    listed = json.loads((HERE / "corpus.json").read_text())["members"]
    return [
        HostileMember(
            line["name"],
            line["status"],
            line["code"],
            (HERE / line["body"]).read_bytes(),
            line["method"],
            line["path"],
            line["headers"],
            line["pace"],
        )
        for line in listed
    ]
