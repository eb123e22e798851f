"""Takes a store, or one adapter of it, elsewhere: one file that holds everything, or a plain PEFT directory.

    backup(root, Path("store.tar"))                     while servers run; the state of one moment
    restore(Path("store.tar"), new_root)                checked wholly before it counts
    export(root, parse_reference("sql@3"), directory)   what PEFT, every other server and every older release reads

Packed images are left out: they are packed again.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from adapters_store.catalog import Catalog
from adapters_store.durable import move_file, raise_if_full, remove, remove_tree, sync_directory
from adapters_store.errors import StoreDamaged, StoreUnusable
from adapters_store.fsck import check
from adapters_store.names import Reference
from adapters_store.record import AdapterVersion
from adapters_store.schema import MARKER

_MEMBER = re.compile(
    r"store\.json|audit\.jsonl|(versions|aliases|rules)/[A-Za-z0-9._%-]+/[a-z0-9_-]+\.json"
    r"|(attributes|tombstones)/[A-Za-z0-9._%-]+\.json"
    r"|blobs/sha256/[0-9a-f]{64}",
    re.ASCII,
)
_CHUNK_BYTES = 1 << 20


class BackedUp(NamedTuple):
    num_adapters: int
    num_versions: int
    num_bytes: int  # of the archive


def backup(root: Path, archive: Path) -> BackedUp:
    """Writes the committed state of one moment to a tar file, whole or not at all; servers go on meanwhile.

    Raises:
        StoreUnusable: there is no store in `root`.
        FileExistsError: `archive` is there.
        DiskFull.
    """
    if archive.exists():
        raise FileExistsError(f"{archive} is there already.")
    temporary = archive.with_name(f"{archive.name}.{uuid.uuid4().hex[:12]}.tmp")
    with _opened(root) as catalog, ExitStack() as leases:
        with catalog.exclusively():  # small files are read at one moment, blobs are held from that moment on
            files = {path: path.read_bytes() for path in _small_files(root)}
            versions = list(_versions(catalog))
            for version in versions:
                leases.enter_context(catalog.lease(Reference(version.name, version.version, None)))
        blobs = {path for version in versions for path in catalog.files_of(version).values() if path.exists()}
        try:
            with temporary.open("wb") as file:
                _write_archive(file, root, files, blobs)
                file.flush()
                os.fsync(file.fileno())
            move_file(temporary, archive)
        except OSError as error:
            remove(temporary)
            raise_if_full(error)
            raise
    return BackedUp(len({version.name for version in versions}), len(versions), archive.stat().st_size)


def restore(archive: Path, root: Path) -> BackedUp:
    """Makes a store in `root`, which must be empty or not there, from what `backup` wrote. Every digest is checked.

    Raises:
        StoreDamaged: the archive is cut, changed or none of ours; nothing is left in `root`.
        StoreUnusable: `root` is not empty.
        DiskFull.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise StoreUnusable(f"{root} is not empty. Restore into a new directory.")
    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = root.with_name(f"{root.name}.{uuid.uuid4().hex[:12]}.restoring")
    try:
        _extract(archive, fresh)
        checkup = check(fresh)
        if not checkup.is_sound:
            wrong = checkup.findings[0]
            raise StoreDamaged(f"{archive} is damaged: {wrong.subject}: {wrong.message}")
        os.replace(fresh, root)
        sync_directory(root.parent)
    except OSError as error:
        raise_if_full(error)
        raise
    finally:
        remove_tree(fresh)
    return BackedUp(checkup.num_adapters, checkup.num_versions, archive.stat().st_size)


def export(root: Path, reference: Reference, directory: Path) -> int:
    """Copies one version's files to a new directory that PEFT and every other server reads; returns its number.

    Raises:
        StoreUnusable: there is no store in `root`.
        AdapterNotFound, AliasNotFound, VersionNotFound.
        FileExistsError: `directory` is there.
        StoreDamaged: a file's digest is not what was committed.
        DiskFull.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} is there already.")
    fresh = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:12]}.exporting")
    with _opened(root) as catalog, catalog.lease(reference) as lease:
        try:
            fresh.mkdir(parents=True)
            paths = catalog.files_of(lease.version)
            for file in lease.version.files:
                if _copy(paths[file.path], fresh / file.path) != file.sha256:
                    raise StoreDamaged(f"{file.path} of {lease.version} is not what was committed. Run fsck.")
            os.rename(fresh, directory)
        except OSError as error:
            raise_if_full(error)
            raise
        finally:
            remove_tree(fresh)
        return lease.version.version


@contextmanager
def _opened(root: Path) -> Iterator[Catalog]:
    if not (root / MARKER).exists():
        raise StoreUnusable(f"{root} is no adapter store.")
    catalog = Catalog(root, base_fingerprint="")
    try:
        yield catalog
    finally:
        catalog.close()


def _versions(catalog: Catalog) -> Iterator[AdapterVersion]:
    after: str | None = ""
    while after is not None:
        page = catalog.page(limit=1000, after=after)
        yield from (version for record in page.records for version in record.versions)
        after = page.next_after


def _small_files(root: Path) -> list[Path]:
    patterns = (
        "versions/*/*.json",
        "aliases/*/*.json",
        "rules/*/*.json",
        "attributes/*.json",
        "tombstones/*.json",
        "audit.jsonl",
    )
    return [root / MARKER, *(path for pattern in patterns for path in sorted(root.glob(pattern)))]


def _write_archive(file: IO[bytes], root: Path, files: dict[Path, bytes], blobs: set[Path]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(str(path.relative_to(root)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for path in sorted(blobs):
            with path.open("rb") as blob:
                member = tarfile.TarInfo(str(path.relative_to(root)))
                member.size = os.fstat(blob.fileno()).st_size
                tar.addfile(member, blob)


def _extract(archive: Path, directory: Path) -> None:
    """Writes the members, each a plain file under a name that a store has. Raises StoreDamaged, FileNotFoundError."""
    seen: set[str] = set()
    try:
        with tarfile.open(archive, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.name in seen or not _MEMBER.fullmatch(member.name):
                    raise StoreDamaged(f"{archive} holds {member.name[:200]!r}, which is no file of a backup.")
                seen.add(member.name)
                target = directory / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None, "a regular file has bytes"
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
    except (tarfile.TarError, EOFError) as error:
        raise StoreDamaged(f"{archive} is no backup, or is cut: {error}.") from error
    if MARKER not in seen:
        raise StoreDamaged(f"{archive} is no backup of an adapter store.")


def _copy(source: Path, target: Path) -> str:
    """The digest of what was copied and synced."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("xb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()
