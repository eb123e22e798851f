"""Two processes work on one store and are killed with SIGKILL at random moments; then the store must hold what it said.

    python -m tests.adapters_store.kill_script STORE NUM_KILLS SEED

Each worker writes down what it is about to do and what the store answered. After both are dead the store is opened:
what was answered must be there, what was under way may be there wholly or not at all, and nothing else may be. Prints a
JSON object: where the kills fell, "operation: last call before" -> number, and how many operations were answered.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store import fsck
from adapters_store.catalog import Catalog
from adapters_store.errors import AliasInUse, NotFound
from adapters_store.images import StagedImage
from adapters_store.names import parse_reference
from adapters_store.record import AdapterRecord, Source
from tests.adapters_store.store_samples import BASE, CONFIG, content, safetensors_bytes

POINTS = ("replace", "link", "fsync", "unlink", "mkdir", "open", "write")
NAME = "shared"
_MAX_DELAY_S = 0.3


def stage_and_commit(catalog: Catalog, data: int, source: Path | None = None) -> int:
    """The number of a new version whose bytes are `data`; downloaded from `source` piece by piece if there is one."""
    tensors = safetensors_bytes({"a": ("I64", [1], struct.pack("<q", data))})
    with catalog.stage() as stage:
        stage.add_file("adapter_config.json", [CONFIG])
        stage.add_file("adapter_model.safetensors", [tensors] if source is None else download(source, tensors))
        (stage.directory / "image").write_bytes(b"image")
        image = StagedImage(stage.directory / "image", "f32", 5)
        committed = catalog.commit(stage, NAME, content(str(data)), Source("upload:"), image=image)
        return committed.version.version


def download(source: Path, data: bytes) -> Iterator[bytes]:
    """`data` by way of a file, in pieces."""
    source.write_bytes(data)
    with source.open("rb", buffering=0) as file:
        while piece := file.read(16):
            yield piece


class Worker:
    """Does one random thing after the other until it is killed."""

    def __init__(self, store: Path, number: int, seed: int, log: Path, phase: mmap.mmap) -> None:
        self._random = random.Random(f"{seed}-{number}")
        self._number = number
        self._seed = seed
        self._alias = f"w{number}"
        self._source = store.parent / f"download-{number}"
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._phase = phase
        self._operation = "open"
        self._write = os.write
        for point in POINTS:
            setattr(os, point, self._watched(point, getattr(os, point)))
        self._catalog = Catalog(store, BASE)

    def run(self) -> None:
        operations = (self.upload, self.upload, self.download, self.alias, self.alias, self.delete, self.hold)
        for step in itertools.count():
            operation = self._random.choice(operations)
            self._operation = operation.__name__
            with contextlib.suppress(NotFound, AliasInUse):
                operation(step)

    def upload(self, step: int, source: Path | None = None) -> None:
        data = (self._seed * 1000 + step) * 2 + self._number
        self._say("commit?", data)
        self._say("commit", data, stage_and_commit(self._catalog, data, source))

    def download(self, step: int) -> None:
        self.upload(step, self._source)

    def alias(self, step: int) -> None:
        version = self._any_version()
        self._say("alias?", self._alias, version)
        self._catalog.aliases.set(NAME, self._alias, version)
        self._say("alias", self._alias, version)

    def delete(self, step: int) -> None:
        version = self._any_version()
        self._say("delete?", version)
        self._catalog.delete(NAME, version)
        self._say("delete", version)

    def hold(self, step: int) -> None:
        with self._catalog.lease(parse_reference(f"{NAME}@{self._any_version()}")) as lease:
            for path in self._catalog.files_of(lease.version).values():
                path.read_bytes()  # raises, and so fails the run, if they are gone

    def _any_version(self) -> int:
        return self._random.choice(self._catalog.record(NAME).versions).version

    def _say(self, *words: Any) -> None:
        self._write(self._log, (json.dumps(words) + "\n").encode())

    def _watched(self, point: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._phase[:64] = f"{self._operation}: {point}".encode().ljust(64)
            return real(*arguments, **options)

        return call


@dataclass
class Truth:
    """What the store has said so far."""

    versions: dict[int, int] = field(default_factory=dict)  # number -> data
    deleted: set[int] = field(default_factory=set)
    aliases: dict[str, int] = field(default_factory=dict)
    num_answers: int = 0
    base: str = BASE  # of the processes that were killed
    read: Callable[[Catalog, int], int] = field(default_factory=lambda: data_of)

    def check(self, store: Path, logs: list[Path]) -> None:
        """Raises AssertionError where the store says something else. Takes over what was under way."""
        maybe_committed: set[int] = set()
        maybe_deleted: set[int] = set()
        maybe_moved: dict[str, int] = {}
        for log in logs:
            for line in log.read_text().splitlines():
                kind, *words = json.loads(line)
                self.num_answers += not kind.endswith("?")
                if kind == "commit?":
                    maybe_committed.add(words[0])
                elif kind == "commit":
                    assert words[1] not in self.versions, f"number {words[1]} was given twice"
                    self.versions[words[1]] = words[0]
                elif kind == "delete?":
                    maybe_deleted.add(words[0])
                elif kind == "delete":
                    self.deleted.add(words[0])
                elif kind == "alias?":
                    maybe_moved[words[0]] = words[1]
                else:
                    self.aliases[words[0]] = words[1]
        self._compare(store, maybe_committed, maybe_deleted, maybe_moved)

    def _compare(self, store: Path, committed: set[int], deleted: set[int], moved: dict[str, int]) -> None:
        catalog = Catalog(store, self.base)
        try:
            known = catalog.page().records
            record = known[0] if known else AdapterRecord(NAME)  # the last version can be deleted too
            found = {version.version: self.read(catalog, version.version) for version in record.versions}
            assert all(version.state == "ready" for version in record.versions)
            for alias, number in self.aliases.items():
                if number in self.deleted or (not found and number in deleted):
                    continue  # it went with the last version
                assert record.aliases.get(alias) in (number, moved.get(alias, number)), f"{alias} is lost"
            self.aliases = {alias: number for alias, number in record.aliases.items() if alias != "default"}
            assert not found or record.aliases.get("default") in found
        finally:
            catalog.close()
        assert not self.deleted & found.keys(), "a deleted version came back"
        for number, data in found.items():
            assert self.versions.get(number, data) == data, f"{number} has other bytes"
            assert number in self.versions or data in committed, f"{number} was never uploaded"
        for number in self.versions.keys() - found.keys() - self.deleted:
            assert number in deleted, f"{number} was committed and is lost"
            self.deleted.add(number)
        self.versions.update(found)
        findings = fsck.check(store).findings
        assert findings == (), findings


def data_of(catalog: Catalog, number: int) -> int:
    """What `stage_and_commit` wrote."""
    version = catalog.look_up(parse_reference(f"{NAME}@{number}"))
    data: int = struct.unpack("<q", catalog.files_of(version)["adapter_model.safetensors"].read_bytes()[-8:])[0]
    return data


def play_round(store: Path, seed: int, hits: Counter[str]) -> list[Path]:
    """Two workers from birth to death; returns their logs."""
    chance = random.Random(seed)
    logs = [store.parent / f"log-{number}" for number in range(2)]
    phases = [mmap.mmap(-1, 64) for _ in logs]
    children = []
    for number, (log, phase) in enumerate(zip(logs, phases, strict=True)):
        phase[:64] = b"open: start".ljust(64)
        log.write_text("")
        child = os.fork()
        if child == 0:
            try:
                Worker(store, number, seed, log, phase).run()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        children.append(child)
    for number in chance.sample((0, 1), 2):
        time.sleep(chance.random() * _MAX_DELAY_S)
        os.kill(children[number], signal.SIGKILL)
        _, status = os.waitpid(children[number], 0)
        assert os.WIFSIGNALED(status), f"worker {number} failed in {bytes(phases[number]).decode()}"
        hits[bytes(phases[number]).decode().strip()] += 1
    return logs


def main() -> None:
    store, num_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    catalog = Catalog(store, BASE)
    truth, hits = Truth(), Counter[str]()
    truth.versions[stage_and_commit(catalog, -1)] = -1
    catalog.close()
    for number in range(num_kills // 2):
        logs = play_round(store, seed + number, hits)
        truth.check(store, logs)
    print(json.dumps({"hits": hits, "answers": truth.num_answers, "versions": len(truth.versions)}))


if __name__ == "__main__":
    main()
