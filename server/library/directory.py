"""Adapters that lie in directories on this machine: which there are, whether they changed, what is copied of them.

    adapters/               --adapters-dir
      sql/                  name "sql"
        adapter_config.json
        adapter_model.safetensors
        training_args.bin   not copied
      org/poet/             name "org/poet"

A directory is never served from: its files are copied into the store, so changing them in place changes nothing that
runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.record import Source
from adapters_store.staging import CONFIG_FILE, WEIGHTS_FILE, Stage, check_path, is_allowed
from server.library.errors import NotADirectory

_CHUNK_BYTES = 1 << 20
_PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterDirectory:
    """One directory that says that it is an adapter."""

    name: str
    path: Path

    def source(self) -> Source:
        """Where it is and, as its stamp, sizes and times of the files that count. Raises OSError."""
        stamp: dict[str, Any] = {}
        for file in self._files():
            facts = file.stat()
            stamp[file.name] = [facts.st_size, facts.st_mtime_ns]
        return Source(self.path.resolve().as_uri(), None, dict(sorted(stamp.items())))

    def copy_into(self, stage: Stage) -> None:
        """Adds its files to a stage; files that are no adapter's are left out.

        Raises:
            FileRefused: its weights are a pickle.
            UploadRefused, DiskFull: as `Stage.add_file`.
            OSError: a file cannot be read.
        """
        if not (self.path / WEIGHTS_FILE).exists() and (self.path / _PICKLED_WEIGHTS).exists():
            check_path(_PICKLED_WEIGHTS)
        for file in self._files():
            with file.open("rb") as opened, stage.open_file(file.name, num_bytes=file.stat().st_size) as sink:
                while chunk := opened.read(_CHUNK_BYTES):
                    sink.write(chunk)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if is_allowed(path.name) and path.is_file())


def find_directories(root: Path) -> list[AdapterDirectory]:
    """Every adapter below `root`, one or two levels deep, sorted by name; hidden directories are passed over.

    Raises:
        NotADirectory: `root` is none, or is an adapter itself.
    """
    if not root.is_dir():
        raise NotADirectory(f"the adapters' directory {root} does not exist. Create it, or name another.")
    if (root / CONFIG_FILE).exists():
        raise NotADirectory(f"{root} is an adapter itself. Name the directory that contains it.")
    found = []
    for path in _subdirectories(root):
        if (path / CONFIG_FILE).exists():
            found.append(AdapterDirectory(path.name, path))
            continue
        inner = (child for child in _subdirectories(path) if (child / CONFIG_FILE).exists())
        found += [AdapterDirectory(f"{path.name}/{child.name}", child) for child in inner]
    return sorted(found, key=lambda directory: directory.name)


def _subdirectories(path: Path) -> Iterator[Path]:
    try:
        entries = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except PermissionError:
        return
    yield from (path / name for name in entries if not name.startswith("."))
