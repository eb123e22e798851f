"""What is said about an adapter and may change, while its versions never do: labels, pins, time to live, retention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from adapters_store.errors import InvalidAttribute, StoreDamaged

_MAX_LABELS = 64
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_MAX_LABEL_LENGTH = 256
_MAX_DESCRIPTION_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class Attributes:
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    pinned: bool = False  # every version: neither expires nor is pruned, and stays in memory where it can
    pinned_versions: frozenset[int] = frozenset()  # these alone
    expires_at: str | None = None  # RFC 3339, UTC: the adapter is deleted then
    keep_versions: int | None = None  # newest versions that retention keeps; None: as the store says

    def is_pinned(self, version: int) -> bool:
        return self.pinned or version in self.pinned_versions

    def to_json(self) -> dict[str, Any]:
        return {
            "labels": dict(self.labels),
            "description": self.description,
            "pinned": self.pinned,
            "pinned_versions": sorted(self.pinned_versions),
            "expires_at": self.expires_at,
            "keep_versions": self.keep_versions,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attributes:
        """Raises StoreDamaged if `data` is not what `to_json` writes."""
        try:
            return cls(
                labels=dict(data["labels"]),
                description=data["description"],
                pinned=data["pinned"],
                pinned_versions=frozenset(data["pinned_versions"]),
                expires_at=data["expires_at"],
                keep_versions=data["keep_versions"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(f"an adapter's attributes lack or mistype {error}.") from error


def check_attributes(attributes: Attributes) -> Attributes:
    """The attributes themselves. Raises InvalidAttribute saying which rule they break."""
    if len(attributes.labels) > _MAX_LABELS:
        raise InvalidAttribute(f"{len(attributes.labels)} labels; an adapter has at most {_MAX_LABELS}.")
    for key, value in attributes.labels.items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > _MAX_LABEL_LENGTH or not value.isprintable():
            raise InvalidAttribute(
                f"the label {key[:80]!r}: keys are 1 to 63 letters, digits and '._/-', the first a letter or digit; "
                f"values are printable text of up to {_MAX_LABEL_LENGTH} characters."
            )
    if len(attributes.description) > _MAX_DESCRIPTION_LENGTH:
        raise InvalidAttribute(f"a description has at most {_MAX_DESCRIPTION_LENGTH} characters.")
    if attributes.keep_versions is not None and attributes.keep_versions < 1:
        raise InvalidAttribute(f"keep_versions is {attributes.keep_versions}; it is at least 1.")
    if attributes.expires_at is not None and not _is_moment(attributes.expires_at):
        raise InvalidAttribute(f"expires_at is {attributes.expires_at[:40]!r}; it is like 2030-01-31T12:00:00Z.")
    return attributes


def _is_moment(text: str) -> bool:
    """Whether it is a date with a time and an offset from UTC."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
