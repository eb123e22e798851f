"""Reads a whole store from its files and says what is wrong: `veneer adapters fsck`.

Safe while servers run on the store. Without `repair` nothing is changed; with it, what can be put right is, and what
cannot be is left for a backup or a new upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    code: str  # blob_missing, blob_damaged, record_damaged, alias_dangling, stray_file, dead_stage, ...
    subject: str  # "sql@3", "sql@prod" or a path relative to the store
    message: str
    repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "subject": self.subject, "message": self.message, "repaired": self.repaired}


@dataclass(frozen=True, slots=True)
class Checkup:
    num_adapters: int
    num_versions: int
    num_bytes: int  # of blobs
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, or everything that was has been repaired."""
        return all(finding.repaired for finding in self.findings)


def check(root: Path, *, repair: bool = False, read_bytes: bool = True) -> Checkup:
    """Checks the store in `root`; with `read_bytes` every blob is hashed.

    Raises:
        StoreUnusable: there is no store, it is of a newer schema, or stays locked.
    """
    raise NotImplementedError
