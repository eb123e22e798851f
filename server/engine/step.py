"""One step of the engine as data, and the three parties it needs: a runner, a residency and an image reader.

Arrays of a plan are parallel, one entry a scheduled sequence: decoding entries first, then prefills by arrival.
There is no phase: an entry computes `counts` tokens from `starts`, and samples when that catches up with its length.

Running example: row 3 decodes (7 tokens known, 6 computed), row 0 has a fresh prompt of 700 tokens, chunks of 512

    rows [3, 0]   starts [6, 0]   counts [1, 512]   samples [True, False]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from server.engine.request import AdapterTicket, RequestDelta, TokenLogprobs
from server.engine.sequence import BoolArray, Int32Array, Int64Array, Sequence, SequenceTable


@dataclass(frozen=True, slots=True)
class StepPlan:
    sequences: list[Sequence]
    rows: Int32Array  # [n] rows in the table
    starts: Int32Array  # [n] first position to compute
    counts: Int32Array  # [n] tokens to compute in this step
    samples: BoolArray  # [n] start + count == length: the last row is sampled

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


class StepResult(NamedTuple):
    """What the runner returns; "index" is a position in the plan's arrays."""

    token_ids: Int64Array  # [number of samples] in plan order of the sampling entries, failed ones included
    logprobs: dict[int, TokenLogprobs]  # index -> record of its sampled token, only for those that asked
    # index -> records of prompt tokens start+1 .. min(start+count, prompt_length-1), for sequences that
    # `wants_prompt_logprobs`: row p of a chunk judges token p+1, which is known.
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    failed: dict[int, str]  # index -> reason (logits of that row not finite): that request fails, nobody else


class Runner(Protocol):
    def execute(self, plan: StepPlan, table: SequenceTable) -> StepResult:
        """Compute the planned tokens' K/V and sample; changes no column of the table.

        Raises:
            StepOutOfMemory: the step did not fit the device; a smaller one may follow at once.
        """

    def join(self, sequence: Sequence) -> None:
        """The sequence got `sequence.row`, with its tokens in the table: register its sampling parameters.

        If this raises, the request fails, and the row goes to somebody else without a `forget`.
        """

    def forget(self, row: int) -> None:
        """Its sequence left this row (ended or preempted)."""


class Residency(Protocol):
    """How resident adapters look to the kernels."""

    def bind(self, slot: int, image_header: dict[str, Any], offset_bytes: int) -> None:
        """Rows of `slot` use the image whose payload lies at this offset of the pool."""

    def free(self, slot: int) -> None:
        """Nothing uses this slot any more; its units are about to be reused."""


class ImageRead(NamedTuple):
    """A finished read. One to the device has either a header or an error, one to the host only at most an error."""

    key: str
    header: dict[str, Any] | None
    error: str | None
    phases_s: dict[str, float] = {}  # noqa: RUF012 -- never changed; seconds in queue, read, check and copy
    is_for_host: bool = False


class HostImage(NamedTuple):
    """An image that the host tier holds."""

    key: str
    name: str
    num_bytes: int
    last_used_s: float  # on the engine's clock


class ImageReader(Protocol):
    """Brings images from disk into units of the pool, off the step's thread, and keeps copies in host memory."""

    @property
    def num_host_hits(self) -> int:
        """Loads that found the image in the host tier."""

    @property
    def host_bytes(self) -> int:
        """Held by the host tier now."""

    def start(self, ticket: AdapterTicket, first_unit: int, num_units: int) -> None:
        """Begin reading; the units belong to the reader until `poll` tells the end. Must not block."""

    def warm(self, ticket: AdapterTicket) -> bool:
        """Bring the image near, so that `start` is quick. True: into the host tier, and `poll` will tell the end."""

    def has_host_room(self, num_bytes: int) -> bool:
        """Whether the host tier could hold an image of this size at all."""

    def is_in_host(self, key: str) -> bool:
        """Whether the host tier holds it now."""

    def drop(self, key: str) -> bool:
        """Take it out of the host tier; False if it is not there."""

    def host_images(self) -> list[HostImage]:
        """Everything in the host tier."""

    def poll(self) -> list[ImageRead]:
        """Reads that ended since the last call. Must not block."""


class AdapterEvent(NamedTuple):
    """A change of residency that the front wants to hear of."""

    key: str
    name: str
    state: str  # AdapterState value after the change: "device", "failed", or "host" or "disk" (evicted, or warmed)
    reason: str  # why it failed or was evicted, else ""


@dataclass(slots=True)
class StepOutput:
    """What one step tells: `request_ids` and `token_ids` are parallel and hold the ordinary case, one new token and
    at most its own log probability; `special` holds whatever says more (first tokens, alternatives, ends). A request
    is in at most one.
    """

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    # Parallel to token_ids where anyone asked for the chosen token's log probability, else empty.
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    special: list[RequestDelta] = field(default_factory=list)
    adapter_events: list[AdapterEvent] = field(default_factory=list)
    num_tokens: int = 0  # computed by this step; 0: nothing could run, so wait for messages or loads, do not spin
