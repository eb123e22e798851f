"""An iterator that may block, read from the event loop without blocking it.

The thread is a daemon of its own, not one of the loop's pool: a read from a silent pipe must not keep the program
from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from server.offline_input import Asked

_NUM_AHEAD = 64


class Feed:
    """Reads at most `_NUM_AHEAD` items before they are asked for."""

    def __init__(self, items: Iterator[Asked]) -> None:
        self._items = items
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Asked | Exception | None] = asyncio.Queue()
        self._room = threading.Semaphore(_NUM_AHEAD)
        self._is_closed = False
        threading.Thread(target=self._read, name="input", daemon=True).start()

    async def next(self) -> Asked | None:
        """The next item, None at the end. Raises what the iterator raises."""
        item = await self._queue.get()
        self._room.release()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Nobody asks for more: the thread ends when it next looks, at the latest with the item it is reading."""
        self._is_closed = True
        self._room.release()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                if self._is_closed:
                    return
                self._put(item)
            self._put(None)
        except Exception as error:  # an unreadable file, for one: whoever waits for the item is told
            self._put(error)

    def _put(self, item: Asked | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
