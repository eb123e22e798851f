"""Tells where the engine is stuck: stacks of all threads on stderr when no step ends for too long.

It works while the interpreter lock is held for good, because `faulthandler` watches from a thread
of its own in C. It only tells; ending the process is the front's decision.
"""

from __future__ import annotations

import faulthandler
import signal
import time

STACKS_SIGNAL = signal.SIGUSR1  # the front asks for stacks with it, whatever the worker is doing

_REARM_SHARE = 8  # arming costs a thread, so a beat within an eighth of the time changes nothing


class Watchdog:
    """Armed between `beat` and `rest`. Stacks come after `watchdog_s` to 9/8 of it without a beat."""

    def __init__(self, watchdog_s: float) -> None:
        self._watchdog_s = watchdog_s
        self._armed_s: float | None = None
        faulthandler.register(STACKS_SIGNAL, all_threads=True, chain=False)

    def beat(self) -> None:
        """Work is going on."""
        now_s = time.monotonic()
        if self._armed_s is not None and now_s - self._armed_s < self._watchdog_s / _REARM_SHARE:
            return
        faulthandler.dump_traceback_later(self._watchdog_s * (1 + 1 / _REARM_SHARE))
        self._armed_s = now_s

    def rest(self) -> None:
        """There is no work; silence is no sign of anything now."""
        if self._armed_s is not None:
            faulthandler.cancel_dump_traceback_later()
            self._armed_s = None
