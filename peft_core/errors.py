"""Why an adapter is not served.

    AdapterError
    ├── UnsupportedAdapter   well-formed, but it asks for what is not served (names field and value, or tensor)
    ├── MalformedAdapter     it contradicts itself: missing or truncated tensors, shapes that do not go together,
    │                        NaN or infinity, a field of the wrong type, not one tensor that belongs to an adapter
    └── BaseMismatch         it is meant for another base: a module that this base lacks, or of another size

Each carries what a program needs besides the message: a stable `code`, and the `field` (with its `value`) or the
`tensor` that is to blame. Nothing here knows HTTP.

Running example:
    UnsupportedAdapter('field "use_dora" = true: ...', field="use_dora", value=True)
    .details() == {"code": "unsupported_adapter", "message": ..., "field": "use_dora", "value": "true", "tensor": None}
"""

from __future__ import annotations

import json
from typing import ClassVar

_MAX_VALUE_CHARS = 120


class AdapterError(Exception):
    """Base of all errors of this package that a file can cause."""

    default_code: ClassVar[str] = "adapter_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        field: str | None = None,
        value: object = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.field = field  # of the adapter's config
        self.value = None if field is None else shown(value)
        self.tensor = tensor  # its name in the adapter's file

    def details(self) -> dict[str, str | None]:
        """The error as plain data, for another process or an HTTP answer."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "value": self.value,
            "tensor": self.tensor,
        }


class UnsupportedAdapter(AdapterError):
    default_code = "unsupported_adapter"


class MalformedAdapter(AdapterError):
    default_code = "malformed_adapter"


class BaseMismatch(AdapterError):
    default_code = "base_mismatch"


def shown(value: object) -> str:
    """A value of a config as a message shows it: JSON where it can be, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # no JSON, or nested to the limit
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."
