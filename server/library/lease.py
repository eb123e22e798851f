"""A resolved reference: the version that it meant at that moment, and what the engine needs to load it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from adapters_store.images import StoredImage
from adapters_store.leases import Lease
from adapters_store.record import AdapterVersion
from peft_core.traits import AdapterTraits
from server.engine.request import AdapterTicket


class AdapterLease:
    """Holds a version's files and image until it is released. Releasing again is harmless."""

    def __init__(self, lease: Lease, image: StoredImage) -> None:
        self._lease = lease
        self.ticket = ticket_of(lease.version, image)

    @property
    def version(self) -> AdapterVersion:
        return self._lease.version

    @property
    def report(self) -> Mapping[str, Any]:
        """The load report of the version."""
        return self._lease.version.content.report

    def release(self) -> None:
        self._lease.release()

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def ticket_of(version: AdapterVersion, image: StoredImage) -> AdapterTicket:
    """What the engine is told of a version whose image is in place."""
    return AdapterTicket(
        key=version.content.effect_digest,
        name=str(version),
        image_path=str(image.path),
        num_bytes=image.num_bytes,
        traits=AdapterTraits.from_json(version.content.report.get("traits", {})),
    )
