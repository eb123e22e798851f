"""What the commands that talk to a running server have in common: its address, its key, and how they end.

Exit codes: 0 done, 1 the server said no, 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from adapters_store.errors import StoreError
from server.admin_client import AdminClient, RequestFailed

SAID_NO, WRONG_USAGE, UNREACHABLE = 1, 2, 3
DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", envvar="VENEER_URL", help="The server's address.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Admin key. Default: the first of $VENEER_ADMIN_API_KEY, else of $VENEER_API_KEY."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Answer = TypeVar("_Answer")


def ask(url: str, key: str | None, question: Callable[[AdminClient], _Answer]) -> _Answer:
    """What the server answers; leaves the command with its reason and exit code when it does not."""
    try:
        return question(AdminClient(url, key or _key_of_environment()))
    except RequestFailed as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(UNREACHABLE if error.status is None else SAID_NO) from None
    except (ValueError, OSError, StoreError) as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None


def _key_of_environment() -> str | None:
    for variable in ("VENEER_ADMIN_API_KEY", "VENEER_API_KEY"):
        keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
        if keys:
            return keys[0]
    return None
