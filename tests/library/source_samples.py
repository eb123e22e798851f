"""What the tests of sources share: an adapter's files, a library that packs nothing, and a look at what is left."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters_store.staging import StageLimits
from server.library.library import Library
from server.library.sources.policy import SourcePolicy
from server.library.sources.puller import Puller
from tests.api.fake_front import FakeLoader

MAX_BYTES = 8_000_000


def adapter_files(rank: int = 4, num_bytes: int = 4) -> dict[str, bytes]:
    """A sound adapter of one tensor, and two files that are no part of it."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    header += b" " * (-len(header) % 8)
    weights = struct.pack("<Q", len(header)) + header + bytes(range(256)) * (num_bytes // 256 + 1)
    return {
        "adapter_config.json": json.dumps({"r": rank}).encode(),
        "adapter_model.safetensors": weights[: 8 + len(header) + num_bytes],
        "training_args.bin": b"a pickle",
        ".gitattributes": b"*.bin filter=lfs",
    }


KEPT = ["adapter_config.json", "adapter_model.safetensors"]


class Place:
    """A library over a fresh store, and a puller with a policy."""

    def __init__(self, library: Library, puller: Puller, root: Path) -> None:
        self.library = library
        self.puller = puller
        self._root = root

    def leftovers(self) -> list[str]:
        """What lies in the store's waiting room."""
        return [path.name for path in (self._root / "staging").iterdir()]

    def is_untouched(self) -> bool:
        """Whether the store holds nothing at all."""
        return not self.leftovers() and not self.library.num_adapters and not list((self._root / "versions").iterdir())


@asynccontextmanager
async def open_place(root: Path, policy: SourcePolicy) -> AsyncIterator[Place]:
    limits = StageLimits(max_file_bytes=MAX_BYTES, max_total_bytes=MAX_BYTES, reserve_bytes=0)
    library = await Library.open(root, FakeLoader(), limits=limits)
    try:
        yield Place(library, Puller(library, policy), root)
    finally:
        await library.close()


async def becomes_empty(place: Place, seconds: float = 5.0) -> bool:
    """Whether the waiting room is cleared before the time is up."""
    for _ in range(int(seconds / 0.02)):
        if not place.leftovers():
            return True
        await asyncio.sleep(0.02)
    return False
