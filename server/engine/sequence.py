"""A request as the engine holds it: a `Sequence`, and, while it runs, one row of the `SequenceTable`.

Numbers that change in every step live in numpy columns, so that a step over 256 sequences is a dozen array
operations and no loop. A waiting or preempted sequence has no row and carries its own tokens.

An adapter's virtual tokens stand before the prompt and count as tokens here (`server.engine.token_layout`).

Running example, a prompt of 5 tokens of which 2 have been generated, blocks of 4 tokens:

    tokens   [p0 p1 p2 p3 | p4 g0 g1 .. | .....]
    computed 6 ->          (g1 is known, its K/V is not in the cache)   length 7, prompt_length 5, num_blocks 2
"""

from __future__ import annotations

import heapq
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from peft_core.traits import PLAIN_TRAITS
from server.engine.request import AdapterTicket, EngineRequest, SamplingParams, TokenLogprobs
from server.engine.token_layout import NEVER, layout_of

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BASE_SLOT = -1  # the slot of sequences that use no adapter
BASE_KEY = "base"  # stands where an adapter's key would
NO_ROW = -1


class SequenceStatus(IntEnum):
    """Ordered: everything after PREEMPTED has ended."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3
    ABORTED = 4
    FAILED = 5

    @property
    def has_ended(self) -> bool:
        return self > SequenceStatus.PREEMPTED


class Sequence:
    """One accepted request. `row` is its place in the table while it runs, else `NO_ROW`."""

    __slots__ = (
        "adapter",
        "arrival",
        "block_hashes",
        "deadline",
        "lacks_room_since",
        "layout",
        "max_length",
        "num_cached_tokens",
        "prompt_length",
        "prompt_logprobs",
        "queue_s",
        "request",
        "row",
        "status",
        "submitted_s",
        "tokens",
    )

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        *,
        max_length: int,
        deadline: float | None = None,
        submitted_s: float = 0.0,
    ) -> None:
        wants_prompt_logprobs = request.params.num_prompt_logprobs is not None
        self.request = request
        self.arrival = arrival  # strictly increasing over submissions: smaller is older
        traits = PLAIN_TRAITS if request.adapter is None else request.adapter.traits
        self.layout = layout_of(traits, request.token_ids, request.task_id)
        # Without its invocation in the prompt, an adapter that waits for one does nothing: that is the base.
        self.adapter: AdapterTicket | None = None if self.layout.active_from == NEVER else request.adapter
        self.max_length = max_length  # tokens known when it ends by length
        self.deadline = deadline  # on the engine's clock, seconds
        self.submitted_s = submitted_s  # on the engine's clock
        self.queue_s = 0.0  # from then to its first admission
        self.status = SequenceStatus.WAITING
        self.row = NO_ROW
        self.tokens: Int32Array = self.layout.tokens(request.token_ids)  # while it holds no row
        self.prompt_length = len(self.tokens)  # virtual tokens included
        self.block_hashes: list[bytes] = []  # of its leading full blocks, as far as anyone asked
        self.lacks_room_since: int | None = None  # first step that had no room for its adapter or its blocks
        self.num_cached_tokens = 0  # prefix-cache hit of its first admission, in tokens of the prompt
        # Records of prompt tokens so far (the first token has none); None: not asked for, or told already.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wants_prompt_logprobs else None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def key(self) -> str:
        return BASE_KEY if self.adapter is None else self.adapter.key

    @property
    def vocab_size(self) -> int | None:
        """Of its adapter, where that is larger than the base's."""
        return None if self.adapter is None else self.adapter.traits.vocab_size

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until the prompt's records were told; the runner computes them only then."""
        return self.prompt_logprobs is not None


class SequenceTable:
    """Rows of the running sequences; every column is preallocated and belongs to the CPU.

    Rows are taken lowest first. Columns of a row that is not `active` are stale.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.max_blocks_per_seq = -(-max_model_len // block_size)
        self.tokens: Int32Array = np.zeros((max_num_seqs, max_model_len), np.int32)  # prompt, then generated
        self.blocks: Int32Array = np.zeros((max_num_seqs, self.max_blocks_per_seq), np.int32)  # unit numbers
        self.num_blocks: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.length: Int32Array = np.zeros(max_num_seqs, np.int32)  # tokens known
        self.computed: Int32Array = np.zeros(max_num_seqs, np.int32)  # tokens whose K/V are in the cache
        self.prompt_length: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.max_length: Int32Array = np.zeros(max_num_seqs, np.int32)  # ends by length there
        self.min_length: Int32Array = np.zeros(max_num_seqs, np.int32)  # does not end by a token before
        self.slot: Int32Array = np.full(max_num_seqs, BASE_SLOT, np.int32)
        # See `TokenLayout`; all 0 for what has no virtual tokens and no invocation.
        self.prefix_length: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.position_offset: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.active_from: Int32Array = np.zeros(max_num_seqs, np.int32)
        self.arrival: Int64Array = np.zeros(max_num_seqs, np.int64)
        self.active: BoolArray = np.zeros(max_num_seqs, np.bool_)
        self.ends_at_eos: BoolArray = np.zeros(max_num_seqs, np.bool_)
        self.is_special: BoolArray = np.zeros(max_num_seqs, np.bool_)  # its tokens travel as a RequestDelta
        self.stop_ids: Int32Array = np.full((max_num_seqs, 4), -1, np.int32)  # padded with -1; widens on demand
        self.sequences: npt.NDArray[np.object_] = np.full(max_num_seqs, None, np.object_)
        self.request_ids: npt.NDArray[np.object_] = np.full(max_num_seqs, None, np.object_)
        self._free_rows = list(range(max_num_seqs))  # a heap

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_active(self) -> int:
        return self.max_num_seqs - len(self._free_rows)

    def join(self, sequence: Sequence, slot: int) -> int:
        """Give the sequence the lowest free row, with its tokens and no blocks; returns the row."""
        assert sequence.row == NO_ROW, "a sequence joins once"
        row = heapq.heappop(self._free_rows)
        params = sequence.params
        length = len(sequence.tokens)
        self.tokens[row, :length] = sequence.tokens
        self.length[row] = length
        self.computed[row] = 0
        self.num_blocks[row] = 0
        self.prompt_length[row] = sequence.prompt_length
        self.max_length[row] = sequence.max_length
        self.min_length[row] = min(sequence.prompt_length + params.min_new_tokens, sequence.max_length + 1)
        self.slot[row] = slot
        self.prefix_length[row] = sequence.layout.prefix_length
        self.position_offset[row] = sequence.layout.position_offset
        self.active_from[row] = sequence.layout.active_from
        self.arrival[row] = sequence.arrival
        self.ends_at_eos[row] = not params.ignore_eos
        # Until its first token is told: that delta carries more than the token.
        self.is_special[row] = bool(params.num_logprobs) or length == sequence.prompt_length
        self._set_stop_ids(row, params.stop_token_ids)
        self.sequences[row] = sequence
        self.request_ids[row] = sequence.request_id
        self.active[row] = True
        sequence.row = row
        return row

    def leave(self, sequence: Sequence) -> None:
        """Take the sequence out of its row; it carries its tokens again. Blocks must be released before."""
        row = sequence.row
        assert self.sequences[row] is sequence, "a sequence leaves the row it holds"
        sequence.tokens = self.tokens[row, : self.length[row]].copy()
        sequence.row = NO_ROW
        self.active[row] = False
        self.sequences[row] = None
        self.request_ids[row] = None
        heapq.heappush(self._free_rows, row)

    def active_rows(self) -> Int64Array:
        """Rows in use, ascending: int64 [num_active]."""
        return np.flatnonzero(self.active)

    def _set_stop_ids(self, row: int, stop_ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_ids) > width:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, len(stop_ids) - width)), constant_values=-1)
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids
