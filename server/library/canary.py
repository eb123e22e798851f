"""A canary: a version that gets a share of an alias's requests and loses it by itself when too many of them fail.

    canary = Canary(version=4, before={3: 1}, weights={3: 90, 4: 10}, max_error_rate=0.05)
    watch = CanaryWatch(canary)
    watch.see(failed=True) -> the reason to roll back, once enough requests were seen and too many of them failed

What counts is the share of failures among the last `window` requests on the version, whichever way they named it.
A caller who leaves is no failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from adapters_store.alias import Weights, weights_to_json
from adapters_store.errors import StoreDamaged


class CanaryState(StrEnum):
    RUNNING = "running"
    ROLLED_BACK = "rolled_back"  # by itself: too many of its requests failed
    STOPPED = "stopped"  # by somebody; the alias means again what it did
    MOVED = "moved"  # the alias was moved by somebody, to the canary or elsewhere


@dataclass(frozen=True, slots=True)
class Canary:
    version: int
    before: Weights  # what the alias meant
    weights: Weights  # what it means while the canary runs
    max_error_rate: float  # 0..1; more than this share of failures ends it
    min_requests: int = 20  # nothing is decided on fewer
    window: int = 200  # requests that are looked back on
    started_at: str = ""  # RFC 3339, UTC
    state: CanaryState = CanaryState.RUNNING
    ended_at: str | None = None
    reason: str | None = None  # why it ended

    def ended(self, state: CanaryState, reason: str, now: str) -> Canary:
        return replace(self, state=state, reason=reason, ended_at=now)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "before": weights_to_json(self.before),
            "weights": weights_to_json(self.weights),
            "max_error_rate": self.max_error_rate,
            "min_requests": self.min_requests,
            "window": self.window,
            "started_at": self.started_at,
            "state": str(self.state),
            "ended_at": self.ended_at,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Canary:
        """Raises StoreDamaged if `data` is not what `to_json` writes."""
        try:
            numbers = {name: {int(v): s for v, s in data[name].items()} for name in ("before", "weights")}
            return cls(**{**data, **numbers, "state": CanaryState(data["state"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreDamaged(f"a canary's rule lacks or mistypes {error}.") from error


class CanaryWatch:
    """Counts, in this process, how the requests of one running canary end."""

    def __init__(self, canary: Canary) -> None:
        self.canary = canary
        self.num_requests = 0
        self.num_failed = 0
        self._recent: deque[bool] = deque(maxlen=canary.window)

    @property
    def error_rate(self) -> float:
        """Of the last `window` requests; 0 before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def see(self, *, failed: bool) -> str | None:
        """Counts one request; the reason to roll back, if there is one."""
        self.num_requests += 1
        self.num_failed += failed
        self._recent.append(failed)
        canary = self.canary
        if len(self._recent) < min(canary.min_requests, canary.window) or self.error_rate <= canary.max_error_rate:
            return None
        return (
            f"{sum(self._recent)} of its last {len(self._recent)} requests failed, "
            f"more than {canary.max_error_rate:.1%}"
        )
