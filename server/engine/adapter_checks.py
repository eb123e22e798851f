"""Whether the books about adapters agree with each other; O(adapters), so for tests and for idle moments."""

from __future__ import annotations

from collections.abc import Mapping

from server.engine.adapter_records import AdapterRecord
from server.engine.adapter_slots import AdapterSlots
from server.engine.block_manager import BlockManager
from server.engine.request import AdapterState


def require_agreement(
    records: Mapping[str, AdapterRecord],
    blocks: BlockManager,
    slots: AdapterSlots,
    idle: set[str],
    pins_by_key: Mapping[str, int],
    kept: set[str],
) -> None:
    """Compare records with the pool, the slots and the running sequences' pins.

    Raises:
        AssertionError: our bookkeeping is wrong; the message says where.
    """
    pins = {key: record.num_pins for key, record in records.items() if record.num_pins}
    _require(pins == pins_by_key, f"pins are {pins}, running sequences hold {pins_by_key}")
    runs = {record.first_unit: record.num_units for record in records.values()}
    _require(runs == {run.first: run.num_units for run in blocks.runs.values()}, "runs without an adapter")
    device = {key: record for key, record in records.items() if record.state is AdapterState.DEVICE}
    evictable = {key for key, record in device.items() if not record.num_pins} - kept
    _require(idle == evictable, "the list of idle adapters is wrong")
    _require({key: record.slot for key, record in device.items()} == slots.by_key(), "slots and adapters differ")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"adapters: {message}")
