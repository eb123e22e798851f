"""The shelf of packed images: built once per effect and variant, found again at every start, never precious.

The *effect* is what the adapter does (a digest of its canonical config and its tensors); the *variant* is what it was
packed for (base fingerprint, dtype, packer version). A missing or odd image is rebuilt from the version's files.

    images/<64 hex of the effect>-<variant>.img     written first
    images/<64 hex of the effect>-<variant>.json    {"num_bytes", "file_bytes"}: the image counts once this is there
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters_store.durable import move_file, read_json, remove, write_json
from adapters_store.errors import StoreDamaged

_TOUCH_EVERY_S = 60.0
_NAME = re.compile(r"([0-9a-f]{64})-([A-Za-z0-9_.-]+)\.(img|json)")


@dataclass(frozen=True, slots=True)
class StoredImage:
    path: Path
    num_bytes: int  # of the payload, as the packer counts it
    file_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether the file is still there at its full length."""
        try:
            return self.path.stat().st_size == self.file_bytes
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class StagedImage:
    """An image that a packer has just written, about to be taken over."""

    path: Path
    variant: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ShelvedImage:
    """An image as the directory shows it, of whatever base and packer."""

    effect: str  # hex
    variant: str
    file_bytes: int
    last_used_s: float  # Unix time, to `_TOUCH_EVERY_S`


class ImageShelf:
    """All images of one store. When an image was last asked for is kept as the time of its file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._images: dict[tuple[str, str], StoredImage] = {}  # (hex of effect, variant)
        self._variants: set[str] = set()
        self._touched_s: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self.num_bytes = 0  # of all images, as of the last `survey` and what came and went here since
        self.survey()
        for effect, variant in list(self._sidecars()):
            self._recall(effect, variant)

    def find(self, effect_digest: str, variant: str) -> StoredImage | None:
        """The image, if it is there and whole."""
        key = (_hex(effect_digest), variant)
        with self._lock:
            image = self._images.get(key)
            if image is None:  # another process may have packed it
                self._recall(*key)
                image = self._images.get(key)
        if image is None or not image.is_whole:
            return None
        self._touch(key, image)
        return image

    def adopt(self, effect_digest: str, image: StagedImage) -> StoredImage:
        """Moves a synced image file onto the shelf; one that is there already stays and `image` is removed."""
        present = self.find(effect_digest, image.variant)
        if present is not None:
            remove(image.path)
            return present
        effect = _hex(effect_digest)
        path, sidecar = self._paths(effect, image.variant)
        file_bytes = image.path.stat().st_size
        move_file(image.path, path)
        write_json(sidecar, {"num_bytes": image.num_bytes, "file_bytes": file_bytes})
        stored = StoredImage(path, image.num_bytes, file_bytes)
        with self._lock:
            self._images[effect, image.variant] = stored
            self._variants.add(image.variant)
            self.num_bytes += file_bytes
        return stored

    def survey(self) -> list[ShelvedImage]:
        """Every image in the directory now; also counts `num_bytes` again."""
        found = []
        for entry in os.scandir(self._directory):
            match = _NAME.fullmatch(entry.name)
            if match is None or match[3] != "img":
                continue
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                facts = entry.stat()
                found.append(ShelvedImage(match[1], match[2], facts.st_size, facts.st_mtime))
        self.num_bytes = sum(image.file_bytes for image in found)
        return found

    def remove(self, image: ShelvedImage) -> int:
        """Removes one image, which the caller knows to be unused; the bytes of it."""
        with self._lock:
            self._images.pop((image.effect, image.variant), None)
        self._remove_files(image.effect, image.variant)
        self.num_bytes -= image.file_bytes
        return image.file_bytes

    def discard(self, effect_digest: str) -> None:
        """Removes an effect's images of every variant that was met; `keep_only` finds others."""
        effect = _hex(effect_digest)
        with self._lock:
            variants = sorted(self._variants)
            gone = [self._images.pop((effect, variant), None) for variant in variants]
            self.num_bytes -= sum(image.file_bytes for image in gone if image is not None)
        for variant in variants:
            self._remove_files(effect, variant)

    def keep_only(self, effect_digests: set[str]) -> None:
        """Removes every image of an effect that is not among these, and every stray file."""
        wanted = {_hex(digest) for digest in effect_digests}
        shelved = list(self._sidecars())  # of other processes too
        with self._lock:  # not while the directory is listed: who looks for an image waits for it
            for key in [key for key in self._images if key[0] not in wanted]:
                del self._images[key]
            for key in shelved:
                if key not in self._images and key[0] in wanted:
                    self._recall(*key)
        for entry in list(os.scandir(self._directory)):
            match = _NAME.fullmatch(entry.name)
            if match is None or (match[1], match[2]) not in self._images:
                remove(Path(entry.path))
        self.survey()

    def _sidecars(self) -> Iterator[tuple[str, str]]:
        for entry in os.scandir(self._directory):
            match = _NAME.fullmatch(entry.name)
            if match is not None and match[3] == "json":
                yield match[1], match[2]

    def _recall(self, effect: str, variant: str) -> None:
        path, sidecar = self._paths(effect, variant)
        try:
            facts = read_json(sidecar)
            image = StoredImage(path, int(facts["num_bytes"]), int(facts["file_bytes"]))
        except (StoreDamaged, OSError, KeyError, TypeError, ValueError):
            return  # it can be packed again
        if image.is_whole:
            self._images[effect, variant] = image
            self._variants.add(variant)

    def _touch(self, key: tuple[str, str], image: StoredImage) -> None:
        now_s = time.time()
        if now_s - self._touched_s.get(key, 0.0) < _TOUCH_EVERY_S:
            return
        self._touched_s[key] = now_s
        with contextlib.suppress(OSError):  # a store that is read only, or an image that has just gone
            os.utime(image.path)

    def _remove_files(self, effect: str, variant: str) -> None:
        """The sidecar first: without it the image does not count."""
        path, sidecar = self._paths(effect, variant)
        self._touched_s.pop((effect, variant), None)
        remove(sidecar)
        remove(path)

    def _paths(self, effect: str, variant: str) -> tuple[Path, Path]:
        stem = f"{effect}-{variant}"
        return self._directory / f"{stem}.img", self._directory / f"{stem}.json"


def _hex(effect_digest: str) -> str:
    return effect_digest.removeprefix("sha256:")
