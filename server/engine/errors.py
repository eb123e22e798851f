"""Everything that can go wrong in the engine, as one tree.

    EngineError
    ├── RequestRefused            the request was never accepted; the caller must change it
    │   ├── InvalidRequest          a token id, a parameter or a request id that cannot be honoured
    │   ├── RequestTooLong          it can never fit the model's length or the pool
    │   └── AdapterTooLarge         its adapter's image is larger than the pool or than the adapters' budget
    ├── RequestFailed             the request was accepted and ended with finish reason "failed"
    │   ├── DeadlineExceeded        its own deadline passed
    │   ├── AdapterLoadFailed       its adapter could not be brought to the device
    │   ├── InvalidLogits           its row of the step was not finite
    │   ├── StepFailed              the step it ran in broke                                  (retryable)
    │   └── OutOfMemory             not even alone does its chunk fit the device              (retryable)
    ├── AdapterBusy               an adapter in use, or being loaded, cannot be evicted       (retryable)
    ├── NoRoomForAdapter          no run of units can be emptied for it now                   (retryable)
    ├── EngineUnavailable         the engine is starting, restarting, stopping or gone        (retryable)
    ├── EngineStartError          the engine could not start, with the reason
    └── StepOutOfMemory           a step did not fit the device: the engine sheds and goes on

`retryable` is data on the class: the same request may succeed when it is sent again unchanged.
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree; `kind` is the name that crosses process borders."""

    retryable = False

    @property
    def kind(self) -> str:
        return type(self).__name__


class RequestRefused(EngineError):
    """Raised by `submit`: nothing was accepted, so nothing will end."""


class InvalidRequest(RequestRefused):
    """The message names the field, its value and the range."""


class RequestTooLong(RequestRefused):
    """The message gives the lengths, the limit and what to change."""


class AdapterTooLarge(RequestRefused):
    """Also raised by an explicit load; the message gives both sizes."""


class RequestFailed(EngineError):
    """Travels as the record of a request that ended with finish reason "failed"."""


class DeadlineExceeded(RequestFailed):
    pass


class AdapterLoadFailed(RequestFailed):
    """Not retryable: a committed version never changes, so its bytes will be as broken tomorrow."""


class InvalidLogits(RequestFailed):
    pass


class StepFailed(RequestFailed):
    retryable = True


class OutOfMemory(RequestFailed):
    retryable = True


class AdapterBusy(EngineError):
    retryable = True


class NoRoomForAdapter(EngineError):
    retryable = True


class EngineUnavailable(EngineError):
    retryable = True


class EngineStartError(EngineError):
    pass


class StepOutOfMemory(EngineError):
    """Raised by a runner out of `execute` before any state of a sequence changed."""
