"""The version of the installed package, for those who tell it to clients."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("veneer")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"


VERSION = _installed()
