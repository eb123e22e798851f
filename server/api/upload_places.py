"""So many uploads at once, and no more: a place is taken before a stage is opened, and given back when it is gone.

async with upload_stage(service) as stage: ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from adapters_store.staging import Stage
from server.api.errors import TooManyUploads
from server.library.obtain import open_stage

if TYPE_CHECKING:
    from server.api.service import Service


class UploadPlaces:
    """Those of one server. Belongs to one event loop."""

    def __init__(self, max_uploads: int) -> None:
        self.num_taken = 0
        self._max_uploads = max_uploads

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises TooManyUploads."""
        if self.num_taken >= self._max_uploads:
            raise TooManyUploads(self._max_uploads)
        self.num_taken += 1
        try:
            yield
        finally:
            self.num_taken -= 1


@asynccontextmanager
async def upload_stage(service: Service) -> AsyncIterator[Stage]:
    """Where the files of one upload arrive; gone when the block ends. Raises NotReady, TooManyUploads, DiskFull."""
    library = service.front.library
    with service.uploads.taken():
        async with open_stage(library.stage) as stage:
            yield stage
