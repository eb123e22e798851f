"""Keeps the packed images of a store within a bound: those unused longest go, and are packed again when needed.

An image that some process on any host may be reading stays: its version is held there. So do those of pinned adapters,
which may be read at any time. Images of other bases and of older packers, which nobody asks for any more, go like the
others, by their age.
"""

from __future__ import annotations

import logging

from adapters_store.holdings import Holdings
from adapters_store.images import ShelvedImage

logger = logging.getLogger(__name__)

_DOWN_TO = 0.9  # of the bound, so that the next image does not sweep again


def sweep_images(holdings: Holdings, max_bytes: int) -> int:
    """Brings all images together below `max_bytes`, where they are not in use; returns the bytes removed."""
    images = sorted(holdings.shelf.survey(), key=lambda image: image.last_used_s)
    total = sum(image.file_bytes for image in images)
    if total <= max_bytes:
        return 0
    removed = 0
    for image in images:
        if total - removed <= max_bytes * _DOWN_TO:
            break
        removed += _remove(holdings, image)
    if total - removed > max_bytes:
        logger.warning("packed images take more than their %d bytes: the others are in use or pinned", max_bytes)
    return removed


def _remove(holdings: Holdings, image: ShelvedImage) -> int:
    """The bytes removed: 0 if it is in use. Nobody can begin to use it meanwhile."""
    with holdings.changing():
        with holdings.reading() as index:
            users, is_pinned = index.users_of(f"sha256:{image.effect}")
        with holdings.locks.tried_all(users) as are_free:
            return holdings.shelf.remove(image) if are_free and not is_pinned else 0
