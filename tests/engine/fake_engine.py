"""An engine without a model: every step each request gets the successor of its last token.

`EngineConfig.model` is its script, e.g. "fake step_ms=5 fail_start=1"; a request id that begins with
"hang", "crash" or "refuse" makes it do so, an adapter whose image is "broken" fails to load.
"""

from __future__ import annotations

import os
import time

from server.engine.config import EngineConfig
from server.engine.description import EngineDescription
from server.engine.errors import AdapterBusy, EngineStartError, InvalidRequest, NoRoomForAdapter
from server.engine.request import (
    AdapterState,
    AdapterTicket,
    EngineErrorRecord,
    EngineRequest,
    FinishReason,
    RequestDelta,
    ResidentAdapter,
    Tier,
    TokenLogprobs,
)
from server.engine.stats import EngineStats
from server.engine.step import AdapterEvent, StepOutput
from server.engine.worker import Progress

EOS = 299


class FakeEngine:
    def __init__(self, script: dict[str, str]) -> None:
        self._script = script
        self._live: dict[str, list[int]] = {}
        self._requests: dict[str, EngineRequest] = {}
        self._ended: list[RequestDelta] = []
        self._adapters: dict[str, AdapterTicket] = {}
        self._evicted: list[AdapterEvent] = []
        self._kept: set[str] = set()
        self._loading: list[tuple[AdapterTicket, float]] = []
        self._num_steps = 0
        self._finished: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ended or self._loading)

    def submit(self, request: EngineRequest) -> None:
        if request.request_id.startswith("refuse"):
            raise InvalidRequest("token id 999 is not in the vocabulary of 300")
        self._live[request.request_id] = []
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> bool:
        if request_id not in self._live:
            return False
        self._end(request_id, RequestDelta(request_id, finish=FinishReason.ABORTED))
        return True

    def step(self) -> StepOutput:
        output = StepOutput(special=self._ended)
        self._ended = []
        time.sleep(float(self._script.get("step_ms", "0")) / 1000)
        self._poll_loads(output)
        for request_id in list(self._live):
            self._advance(request_id, output)
        self._num_steps += 1
        return output

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live), total_steps=self._num_steps, total_finished=dict(self._finished), num_units=64
        )

    def expect(self, ticket: AdapterTicket) -> None:
        self.load(ticket)

    def keep(self, tickets: list[AdapterTicket]) -> None:
        if any("huge" in ticket.name for ticket in tickets):
            raise NoRoomForAdapter("the pinned adapters would take more than there is")
        self._kept = {ticket.key for ticket in tickets}
        self._adapters.update({ticket.key: ticket for ticket in tickets})

    def load(self, ticket: AdapterTicket, tier: Tier = Tier.DEVICE) -> AdapterState:
        if ticket.key in self._adapters:
            return AdapterState.DEVICE
        self._loading.append((ticket, time.monotonic() + 0.02))
        return AdapterState.LOADING

    def evict(self, key: str, tier: Tier = Tier.DEVICE) -> bool:
        if any(request.adapter and request.adapter.key == key for request in self._requests.values()):
            raise AdapterBusy(f"adapter {key} is used by running requests")
        ticket = self._adapters.pop(key, None)
        if ticket is not None:
            self._evicted.append(AdapterEvent(key, ticket.name, AdapterState.DISK.value, "asked"))
        return ticket is not None

    def residents(self, *, with_past: bool = False) -> list[ResidentAdapter]:
        return [
            ResidentAdapter(
                key, ticket.name, AdapterState.DEVICE, ticket.num_bytes, 1, 0, 0.0, is_kept=key in self._kept
            )
            for key, ticket in self._adapters.items()
        ]

    def _poll_loads(self, output: StepOutput) -> None:
        output.adapter_events += self._evicted
        self._evicted = []
        for ticket, ready_s in list(self._loading):
            if time.monotonic() < ready_s:
                continue
            self._loading.remove((ticket, ready_s))
            broken = "broken" in ticket.image_path
            if not broken:
                self._adapters[ticket.key] = ticket
            state = AdapterState.FAILED if broken else AdapterState.DEVICE
            output.adapter_events.append(AdapterEvent(ticket.key, ticket.name, state.value, "truncated" * broken))

    def _advance(self, request_id: str, output: StepOutput) -> None:
        if request_id.startswith("hang"):
            time.sleep(3600)
        if request_id.startswith("crash"):
            os._exit(9)
        request, tokens = self._requests[request_id], self._live[request_id]
        if request.adapter is not None and "broken" in request.adapter.image_path:
            error = EngineErrorRecord("AdapterLoadFailed", f"{request.adapter.name} is truncated", False)
            self._end(request_id, RequestDelta(request_id, finish=FinishReason.FAILED, error=error))
            return
        token_id = ((tokens or list(request.token_ids))[-1] + 1) % (EOS + 1)
        tokens.append(token_id)
        output.num_tokens += 1
        finish = None
        if len(tokens) == request.params.max_new_tokens:
            finish = FinishReason.LENGTH
        if token_id == EOS and not request.params.ignore_eos:
            finish = FinishReason.EOS
        if len(tokens) > 1 and finish is None and request.params.num_logprobs is None:
            output.request_ids.append(request_id)
            output.token_ids.append(token_id)
            return
        delta = _special(request, tokens, finish)
        if finish is None:
            output.special.append(delta)
        else:
            self._end(request_id, delta, output.special)

    def _end(self, request_id: str, delta: RequestDelta, told: list[RequestDelta] | None = None) -> None:
        del self._live[request_id], self._requests[request_id]
        (self._ended if told is None else told).append(delta)
        assert delta.finish is not None
        self._finished[delta.finish.value] = self._finished.get(delta.finish.value, 0) + 1


def _special(request: EngineRequest, tokens: list[int], finish: FinishReason | None) -> RequestDelta:
    token_id, params = tokens[-1], request.params
    record = TokenLogprobs(
        token_id, -0.25, 1, tuple((token_id + i, -0.25 - i) for i in range(params.num_logprobs or 0))
    )
    prompt = None
    if params.num_prompt_logprobs is not None and len(tokens) == 1:
        prompt = (None, *(TokenLogprobs(prompt_id, -0.5, 1, ()) for prompt_id in request.token_ids[1:]))
    return RequestDelta(
        request.request_id,
        (token_id,),
        () if params.num_logprobs is None else (record,),
        prompt,
        num_cached_tokens=len(request.token_ids) // 16 * 16 if len(tokens) == 1 else 0,
        finish=finish,
    )


def build_engine(config: EngineConfig, progress: Progress) -> tuple[FakeEngine, EngineDescription]:
    script = dict(word.split("=") for word in config.model.split()[1:])
    progress("load", 0.0)
    if "fail_start" in script:
        raise EngineStartError("the model's attention is not supported")
    if "broken_start" in script:
        raise KeyError("weights")
    if "die_at_start" in script:
        os._exit(3)
    progress("load", 1.0)
    description = EngineDescription(
        spec={"model_type": "fake", "fingerprint": "f00d", "sites": {}},
        max_model_len=int(script.get("max_model_len", "4096")),
        vocab_size=EOS + 1,
        eos_token_ids=(EOS,),
        num_units=64,
        unit_bytes=1024,
        block_size=16,
        max_num_seqs=config.max_num_seqs,
        dtype="float32",
        device="cpu",
        adapter_dtype="float32",
    )
    return FakeEngine(script), description
