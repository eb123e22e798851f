"""Why an adapter was not converted."""

from __future__ import annotations


class ConversionRefused(Exception):
    """What is wrong with the source, and what to do; nothing was written."""
