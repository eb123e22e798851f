"""Numbers under which the kernels know resident adapters: small, dense, the lowest free one first."""

from __future__ import annotations

import heapq

from server.engine.adapter_records import NO_SLOT, AdapterRecord


class AdapterSlots:
    """Which record has which slot; a record has at most one."""

    def __init__(self) -> None:
        self._records: list[AdapterRecord | None] = []
        self._free: list[int] = []  # a heap

    @property
    def next_free(self) -> int:
        return self._free[0] if self._free else len(self._records)

    def take(self, record: AdapterRecord) -> None:
        """Give the record the slot `next_free`."""
        record.slot = self.next_free
        if self._free:
            heapq.heappop(self._free)
        else:
            self._records.append(None)
        self._records[record.slot] = record

    def give_back(self, record: AdapterRecord) -> None:
        self._records[record.slot] = None
        heapq.heappush(self._free, record.slot)
        record.slot = NO_SLOT

    def __getitem__(self, slot: int) -> AdapterRecord:
        record = self._records[slot]
        assert record is not None, "released slots are bound"
        return record

    def by_key(self) -> dict[str, int]:
        """The slot of each bound record, as the slots see it."""
        return {record.ticket.key: slot for slot, record in enumerate(self._records) if record is not None}
