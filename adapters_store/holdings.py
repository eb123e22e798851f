"""What this process knows of a store that others change too, and the one frame in which a change is made.

    with holdings.reading() as index: ...                 the state of this moment, changes of others included
    with holdings.changing("sql") as disk: ...            nobody else changes anything until this ends
        with holdings.announced("sql"): ...               files of sql may be written; read again at the end

A process that dies inside `announced` leaves its lock, and a notice without an end: whoever changes something next
first settles that name. So does every change with its own name, before it looks at it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from adapters_store.durable import make_directory, raise_if_full, remove, remove_tree, write_json
from adapters_store.images import ImageShelf
from adapters_store.index import Index, Mark
from adapters_store.journal import Journal
from adapters_store.layout import Layout
from adapters_store.locks import CHANGE, StoreLocks
from adapters_store.on_disk import OnDisk, read_name
from adapters_store.record import AdapterRecord, AdapterVersion

logger = logging.getLogger(__name__)

_CHANGE_TIMEOUT_S = 60.0


def now() -> str:
    """RFC 3339, UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Holdings:
    """Any thread may call; changes wait for each other, reading does not wait for them."""

    def __init__(self, root: Path, judge: Callable[[Layout, AdapterVersion], Mark]) -> None:
        """Raises as `Layout`."""
        self.layout = Layout(root)
        self._judge = judge
        self._changing = threading.Lock()  # held through a change, fsyncs included
        self._reading = threading.Lock()  # held for the moment of touching the index
        self._process = uuid.uuid4().hex[:16]
        self._index = Index()
        self._unread: set[str] | None = None  # names whose files may have changed since they were read; None: all
        try:
            self.locks = StoreLocks(self.layout.locks)
            self.locks.share(self._process)
            self.shelf = ImageShelf(self.layout.images)
            self._journal = Journal(self.layout.changes)
            self._read_all()
        except BaseException:
            self.layout.close()
            raise

    def close(self) -> None:
        """Gives up every hold. Again is harmless."""
        with self._changing:
            self.layout.close()
            self.locks.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Index]:
        """The index, up to date with what other processes did."""
        with self._reading:
            self._catch_up()
            yield self._index

    @contextlib.contextmanager
    def glancing(self) -> Iterator[Index | None]:
        """The index, if nobody else is at it and nothing has changed that would have to be read; else None."""
        if not self._reading.acquire(blocking=False):
            yield None
            return
        try:
            yield self._index if self._unread == set() and self._journal.is_at_end else None
        finally:
            self._reading.release()

    @contextlib.contextmanager
    def changing(self, name: str | None = None) -> Iterator[OnDisk]:
        """Keeps every other process and thread from changing the store; what stands about `name`, settled.

        Raises:
            StoreBusy: another process does not come to an end.
        """
        with self._changing, self.locks.alone(CHANGE, _CHANGE_TIMEOUT_S):
            with self._reading:
                self._catch_up()
                unfinished = self._journal.unfinished
            if unfinished is not None:
                self._settle(unfinished)
            if name is not None:
                self._settle(name)
            with self._reading:
                disk = self._index.disk(name or "")
            yield disk

    @contextlib.contextmanager
    def announced(self, name: str) -> Iterator[None]:
        """Around every change of a name's files. Raises DiskFull before the first."""
        try:
            self._journal.begin(name)
        except OSError as error:
            raise_if_full(error)
            raise
        try:
            yield
        finally:
            try:
                self._journal.end(name)
            except OSError as error:
                logger.warning("the notice of a change of %s could not be ended: %s", name, error)
            with self._reading:
                self._catch_up()

    def record(self, name: str) -> AdapterRecord | None:
        with self.reading() as index:
            return index.record(name) if index.disk(name).versions.keys() - index.disk(name).gone else None

    def settle_all(self, *, again: bool = True) -> None:
        """Settles every name that a crash left half changed; reads every file `again` before."""
        with self._reading:
            if again:
                self._read_all()
            names = self._index.unsettled_names()
        with self.changing():
            for name in names:
                self._settle(name)

    def new_stage(self) -> Path:
        """Where an upload of this process may lie; taken for dead once the process is."""
        return self.layout.staging / f"{self._process}-{uuid.uuid4().hex}"

    def sweep_stages(self) -> int:
        """Removes the uploads of processes that are no more; returns how many."""
        num_swept = 0
        for path in list(self.layout.staging.iterdir()):
            process = path.name.partition("-")[0]
            with self.locks.tried(process) as is_dead:
                if is_dead:
                    remove(path) if path.is_file() else remove_tree(path)
                    num_swept += 1
        return num_swept

    # ------------------------------------------------------------------ private

    def _settle(self, name: str) -> None:
        """Writes down what the files of a name mean, where a crash left them saying something else."""
        with self._reading:
            disk = self._index.disk(name)
            is_dead = not disk.is_damaged and not disk.damaged and not disk.versions.keys() - disk.gone
        leftovers = disk.unsettled()
        has_attributes = is_dead and self.layout.attributes_path(name).exists()
        if not leftovers and not has_attributes and self._journal.unfinished != name:
            return
        with self.announced(name):
            for alias, meaning in leftovers.items():
                if meaning is None:
                    remove(self.layout.alias_path(name, alias))
                else:
                    make_directory(self.layout.alias_path(name, alias).parent)
                    write_json(self.layout.alias_path(name, alias), meaning.to_json())
            if has_attributes:
                remove(self.layout.attributes_path(name))

    def _catch_up(self) -> None:
        try:
            names = self._journal.poll()
            if names is None or self._unread is None:
                self._read_all()
            else:
                self._unread |= names
                self._read_unread(self._unread)
        except OSError as error:
            if not self.layout.is_open:
                raise
            logger.error("changes of other processes cannot be read: %s", error)

    def _read_all(self) -> None:
        self._unread = None  # should one of the next two fail
        self._journal.jump()
        names = self.layout.names()
        self._unread = set(names)
        self._index.clear_unlisted(names)
        is_collecting = gc.isenabled()
        gc.disable()  # all that is read stays; to look for garbage among it takes as long as reading it
        try:
            self._read_unread(self._unread)
        finally:
            if is_collecting:
                gc.enable()

    def _read_unread(self, names: set[str]) -> None:
        """Takes what could be read out of `names`. Raises OSError after the last if one could not."""
        failure: OSError | None = None
        for name in sorted(names):
            try:
                self._read(name)
            except OSError as error:
                failure = error
            else:
                names.discard(name)
        if failure is not None:
            raise failure

    def _read(self, name: str) -> None:
        disk = read_name(self.layout, name, self._index.disk(name).versions)
        self._index.put(name, disk, lambda version: self._judge(self.layout, version))
