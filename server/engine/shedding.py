"""What to do when a step does not fit the device: run half of it, stay small for a while, grow again.

The pool is allocated once, so what runs out is room for activations, and that follows the tokens of the step.
Nothing is preempted: sequences left out of a step simply run in the next.
"""

from __future__ import annotations

import numpy as np

from server.engine.step import StepPlan

_STEPS_UNTIL_GROWTH = 64


class TokenBudget:
    """Tokens a step may have: the configured number, halved by memory running out, doubled again by quiet steps."""

    def __init__(self, max_tokens: int) -> None:
        self.tokens = max_tokens
        self._max_tokens = max_tokens
        self._num_quiet_steps = 0

    def shrink(self, num_tokens: int) -> None:
        """A step had to be cut down to `num_tokens`."""
        self.tokens = max(1, num_tokens)
        self._num_quiet_steps = 0

    def recover(self) -> None:
        """A step went well."""
        if self.tokens == self._max_tokens:
            return
        self._num_quiet_steps += 1
        if self._num_quiet_steps == _STEPS_UNTIL_GROWTH:
            self.tokens = min(2 * self.tokens, self._max_tokens)
            self._num_quiet_steps = 0


def first_half(plan: StepPlan) -> StepPlan:
    """The leading entries with at most half the tokens, at least one entry and never all of them."""
    num_kept = int(np.searchsorted(plan.counts.cumsum(), plan.num_tokens // 2, side="right"))
    num_kept = min(max(1, num_kept), len(plan.rows) - 1)
    return StepPlan(
        plan.sequences[:num_kept],
        plan.rows[:num_kept],
        plan.starts[:num_kept],
        plan.counts[:num_kept],
        plan.samples[:num_kept],
    )
