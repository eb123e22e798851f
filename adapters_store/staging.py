"""The waiting room of an upload: files arrive here, bounded and hashed, before anything trusts them.

A stage is a directory of its own under `staging/`. It ends by being committed (its files move away) or closed (it is
removed); what a crash leaves behind is removed when the store is opened.

    with catalog.stage() as stage:
        stage.add_file("adapter_config.json", [b"{...}"])
        ...
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from adapters_store.durable import raise_if_full, remove_tree, sync_directory
from adapters_store.errors import BlobNotFound, DigestMismatch, DiskFull, FileRefused, TooLarge
from adapters_store.record import StoredFile, manifest_digest
from adapters_store.staged_bytes import StagedBytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HUB_WEIGHTS_FILE = "adapter.safetensors"  # as AdapterHub's `adapters` library calls it
HUB_HEAD_FILE = "model_head.safetensors"  # a head beside it
TENSOR_FILES = (WEIGHTS_FILE, HUB_WEIGHTS_FILE, HUB_HEAD_FILE)
MLX_WEIGHTS_FILE = "adapters.safetensors"
ALLOWED_FILES = (
    CONFIG_FILE,
    *TENSOR_FILES,
    "head_config.json",
    "README.md",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*.jinja",
    "chat_template*.json",
)

_CONFIGS = (CONFIG_FILE, "head_config.json")
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)  # no separators, so nothing climbs
_OTHER_WEIGHTS = ("adapter_model.bin", "pytorch_adapter.bin", MLX_WEIGHTS_FILE)  # each refused with its own advice
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class StageLimits:
    max_file_bytes: int = 2 * 2**30
    max_total_bytes: int = 2 * 2**30
    max_files: int = 32
    max_config_bytes: int = 2**20  # of files that are read whole: configs
    max_text_bytes: int = 64 * 2**20  # of the other files without tensors: tokenizers, templates
    reserve_bytes: int = 64 * 1024 * 1024  # of the disk, left free whatever is uploaded
    max_staged_bytes: int | None = None  # of all stages of a process together; None: as much as the disk takes

    def of_file(self, path: str) -> int:
        """Bytes that a file of this name may have."""
        if path in TENSOR_FILES:
            return self.max_file_bytes
        return min(self.max_config_bytes if path in _CONFIGS else self.max_text_bytes, self.max_file_bytes)


def check_path(path: str) -> str:
    """The path itself if an adapter may hold such a file. Raises FileRefused."""
    if path.endswith(_PICKLES):
        raise FileRefused(
            f"{path[:200]!r} looks like a pickle, which can run code when it is read. Only safetensors is accepted: "
            "save the adapter with `save_pretrained(..., safe_serialization=True)`, or convert its directory with "
            "`veneer adapters convert SRC DST`, and leave other files out."
        )
    if path == MLX_WEIGHTS_FILE:
        raise FileRefused(f"{path!r} is what MLX calls its weights. Convert it: `veneer adapters convert SRC DST`.")
    if path.endswith(".gguf"):
        raise FileRefused(f"{path[:200]!r} is GGUF, which does not say how the adapter is scaled. Use its original.")
    if _PLAIN.fullmatch(path) and any(fnmatch.fnmatchcase(path, pattern) for pattern in ALLOWED_FILES):
        return path
    raise FileRefused(f"{path[:200]!r} is no file of an adapter. Accepted: {', '.join(ALLOWED_FILES)}.")


def is_allowed(path: str) -> bool:
    try:
        check_path(path)
    except FileRefused:
        return False
    return True


def refuse_other_weights(paths: Collection[str]) -> None:
    """Raises FileRefused where an adapter's only weights are a pickle, or must be converted first."""
    if WEIGHTS_FILE in paths or HUB_WEIGHTS_FILE in paths:
        return
    for path in _OTHER_WEIGHTS:
        if path in paths:
            check_path(path)


class Stage:
    """One upload in progress. One writer at a time; not thread-safe."""

    SPACE_CHECK_BYTES: ClassVar[int] = 64 * 1024 * 1024  # what may be written between two looks at the free space

    def __init__(self, directory: Path, limits: StageLimits, room: StagedBytes | None = None) -> None:
        """`room` is what the stages of a process share; without it there is no bound. Raises DiskFull."""
        self.directory = directory
        self.limits = limits
        self.share = (room or StagedBytes(None)).share()
        self._files: dict[str, StoredFile] = {}
        self._num_bytes = 0
        self._num_unchecked_bytes = 0
        self._sinks: list[FileSink] = []
        self._is_owned = True
        try:
            directory.mkdir()
        except OSError as error:
            raise_if_full(error)
            raise
        try:
            self.require_space(0)
        except DiskFull:
            remove_tree(directory)
            raise

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """The complete files so far, sorted by path."""
        return tuple(sorted(self._files.values(), key=lambda file: file.path))

    @property
    def manifest_digest(self) -> str:
        return manifest_digest(self._files.values())

    def path_of(self, path: str) -> Path:
        """Where a complete file lies. Raises KeyError if there is none of that name."""
        return self.directory / self._files[path].path

    def add_file(self, path: str, chunks: Iterable[bytes], *, sha256: str | None = None) -> StoredFile:
        """Takes one file whole.

        Raises:
            FileRefused: the path is not one of ALLOWED_FILES, or was added before.
            TooLarge: a cap of StageLimits is passed; what was written of it is gone.
            DigestMismatch: its digest is not `sha256` (64 hex digits).
            DiskFull: it would leave less than `reserve_bytes` free.
            StagingFull: all stages together would take more than `max_staged_bytes`.
        """
        with self.open_file(path, sha256=sha256) as sink:
            for chunk in chunks:
                sink.write(chunk)
        return self._files[path]

    def open_file(self, path: str, *, num_bytes: int | None = None, sha256: str | None = None) -> FileSink:
        """A sink for a file that comes in pieces; complete when its `with` block ends without an error.

        `num_bytes`, where known, is checked against caps and disk before the first byte. Raises as `add_file`.
        """
        self._require_new(path)
        if num_bytes is not None:
            self._check_caps(path, num_bytes, num_bytes)
            self.require_space(num_bytes)
        sink = FileSink(self, path, sha256)
        self._sinks.append(sink)
        return sink

    def adopt(self, path: str, place: Path, num_bytes: int, sha256: str) -> None:
        """Adds a file that lies in the same store, by a hard link; its digest has been verified.

        Raises BlobNotFound where it is gone, and as `add_file`.
        """
        self._require_new(path)
        self._account(path, num_bytes, num_bytes)
        try:
            os.link(place, self.directory / path)
        except FileNotFoundError:
            raise BlobNotFound(f"there is no blob sha256:{sha256} any more. Send it again.") from None
        except OSError as error:
            raise_if_full(error)
            raise
        self._complete(StoredFile(path, num_bytes, sha256))

    def take_over(self) -> Stage:
        """The same stage under a new owner, who closes it: closing this one does nothing any more."""
        successor = copy.copy(self)
        self._is_owned = False
        return successor

    def close(self) -> None:
        """Removes the stage and whatever is still in it. Again is harmless."""
        if not self._is_owned:
            return
        for sink in self._sinks:
            sink.abandon()
        remove_tree(self.directory)
        self.share.give_back()

    def _require_new(self, path: str) -> None:
        check_path(path)
        if path in self._files or (self.directory / path).exists():
            raise FileRefused(f"{path!r} was sent twice; which one is meant cannot be known.")
        if len(self._files) >= self.limits.max_files:
            raise TooLarge(f"more than {self.limits.max_files} files; an adapter needs fewer.")

    def _check_caps(self, path: str, file_bytes: int, added_bytes: int) -> None:
        limit = self.limits.of_file(path)
        if file_bytes > limit:
            raise TooLarge(f"{path!r} is larger than the limit of {limit} bytes for one such file.")
        if self._num_bytes + added_bytes > self.limits.max_total_bytes:
            raise TooLarge(f"the files together are over the limit of {self.limits.max_total_bytes} bytes.")

    def announce(self, num_bytes: int) -> None:
        """Looks whether so many bytes can come, and counts them before they do. Raises DiskFull, StagingFull."""
        self.require_space(num_bytes)
        self.share.reserve(num_bytes)

    def require_space(self, num_bytes: int) -> None:
        """Raises DiskFull unless so many bytes more leave the reserve free."""
        free = shutil.disk_usage(self.directory).free
        if free - num_bytes < self.limits.reserve_bytes:
            raise DiskFull(
                f"{free} bytes are free where adapters are kept and {self.limits.reserve_bytes} stay in reserve: "
                f"{num_bytes} more do not fit. Delete adapters or free some space."
            )

    def _account(self, path: str, file_bytes: int, added_bytes: int) -> None:
        self._check_caps(path, file_bytes, added_bytes)
        self.share.add(added_bytes)
        self._num_bytes += added_bytes
        self._num_unchecked_bytes += added_bytes
        if self._num_unchecked_bytes >= self.SPACE_CHECK_BYTES:
            self._num_unchecked_bytes = 0
            self.require_space(0)

    def _complete(self, file: StoredFile) -> None:
        self._files[file.path] = file

    def _forget(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


class FileSink:
    """Where the bytes of one file go while they arrive: counted, hashed, synced at the end."""

    def __init__(self, stage: Stage, path: str, sha256: str | None) -> None:
        self._stage = stage
        self._path = path
        self._expected = sha256
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self._file = (stage.directory / path).open("xb")

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.abandon()

    def write(self, chunk: bytes) -> None:
        """Takes the next bytes. Raises TooLarge, DiskFull; the file is of no use then."""
        self._stage._account(self._path, self._num_bytes + len(chunk), len(chunk))
        self._num_bytes += len(chunk)
        self._hash.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise_if_full(error)
            raise

    def finish(self) -> StoredFile:
        """Syncs the file and adds it to the stage. Raises DigestMismatch, DiskFull."""
        digest = self._hash.hexdigest()
        if self._expected is not None and self._expected.lower() != digest:
            self.abandon()
            raise DigestMismatch(
                f"{self._path!r}: the bytes received have sha256 {digest}, announced was {self._expected[:80]!r}."
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            sync_directory(self._stage.directory)
            self._file.close()
        except OSError as error:
            self.abandon()
            raise_if_full(error)
            raise
        file = StoredFile(self._path, self._num_bytes, digest)
        self._stage._complete(file)
        return file

    def abandon(self) -> None:
        """Forgets the file unless it is complete. Again is harmless."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # buffered bytes that did not fit are unwanted anyway
            self._file.close()
        (self._stage.directory / self._path).unlink(missing_ok=True)
        self._stage._forget(self._num_bytes)
        self._num_bytes = 0
