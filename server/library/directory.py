"""Adapters that lie in directories on this machine: which there are, whether they changed, what is copied of them.

    adapters/               --adapters-dir
      sql/                  name "sql"
        adapter_config.json
        adapter_model.safetensors
        training_args.bin   not copied
      org/poet/             name "org/poet"
      both/                 name "both", as PEFT saves a model of several adapters
        adapter_config.json
        adapter_model.safetensors
        other/              name "both/other"
      checkpoint-500/       below an adapter: passed over, a trainer's

A directory is never served from: its files are copied into the store, so changing them in place changes nothing that
runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.errors import FileRefused
from adapters_store.record import Source
from adapters_store.staging import CONFIG_FILE, Stage, is_allowed, refuse_other_weights
from server.library.errors import NotADirectory

_CHUNK_BYTES = 1 << 20
_CHECKPOINT = re.compile(r"checkpoint-\d+")


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
            FileRefused: its weights are a pickle, or in a format that must be converted first; see `adapter_in`.
            UploadRefused, DiskFull: as `Stage.add_file`.
            OSError: a file cannot be read.
        """
        refuse_other_weights(os.listdir(adapter_in(self.path)))
        for file in self._files():
            with file.open("rb") as opened, stage.open_file(file.name, num_bytes=file.stat().st_size) as sink:
                while chunk := opened.read(_CHUNK_BYTES):
                    sink.write(chunk)

    def _files(self) -> list[Path]:
        home = adapter_in(self.path)
        return sorted(path for path in home.iterdir() if is_allowed(path.name) and path.is_file())


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
        found += [AdapterDirectory(f"{path.name}/{child.name}", child) for child in _adapters_in(path)]
    return sorted(found, key=lambda directory: directory.name)


def adapter_in(path: Path) -> Path:
    """Where the adapter is that a directory means: the directory, or its only sub-folder that holds one.

    PEFT saves an adapter that is not called "default" into a folder of its name.

    Raises:
        FileRefused: there are several, and which one is meant cannot be known.
    """
    if (path / CONFIG_FILE).exists() or not path.is_dir():
        return path
    inner = _adapters_in(path)
    if len(inner) > 1:
        names = ", ".join(child.name for child in inner)
        raise FileRefused(f"{path} holds several adapters: {names}. Name one of these folders.")
    return inner[0] if inner else path


def _adapters_in(path: Path) -> list[Path]:
    is_adapter = (path / CONFIG_FILE).exists()
    children = [child for child in _subdirectories(path) if (child / CONFIG_FILE).exists()]
    return [child for child in children if not (is_adapter and _CHECKPOINT.fullmatch(child.name))]


def _subdirectories(path: Path) -> Iterator[Path]:
    try:
        entries = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except PermissionError:
        return
    yield from (path / name for name in entries if not name.startswith("."))
