"""A bound on what one adapter's config may cost: an expression in it can keep a matcher busy for ever.

Python's matcher looks for signals while it works, so a timer of the processor's time ends it from inside, and the
process goes on with the next adapter.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class PatienceLost(Exception):
    """The time is up."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises PatienceLost inside the block once it has used so much processor time.

    Only a process's main thread can be interrupted so, and the loader works there; in any other there is no bound.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise PatienceLost
