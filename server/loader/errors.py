"""Why an adapter did not come out of the loader.

    LoaderError
    ├── AdapterRefused      the adapter is to blame; the same files are refused again
    └── LoaderUnavailable   the loader process died, or is stopped: try again

`code` is stable. An AdapterRefused carries the code of whoever refused it (a decoder, the header check, the loader).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LoaderError(Exception):
    code: str = "loader_error"
    retryable: bool = False


class AdapterRefused(LoaderError):
    """The adapter cannot be served, and why.

    Attributes:
        field: of adapter_config.json, with `value` as text; None where no field is to blame.
        tensor: name in the weights' file; None where no tensor is to blame.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        field: str | None = None,
        value: str | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.field = field
        self.value = value
        self.tensor = tensor

    def details(self) -> dict[str, str | None]:
        """The error as plain data."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "value": self.value,
            "tensor": self.tensor,
        }

    @classmethod
    def from_details(cls, data: Mapping[str, Any]) -> AdapterRefused:
        return cls(data["message"], code=data["code"], field=data["field"], value=data["value"], tensor=data["tensor"])


class LoaderUnavailable(LoaderError):
    code = "loader_unavailable"
    retryable = True
