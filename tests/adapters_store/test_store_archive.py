"""Archives from the packers that people have, and from nobody in particular."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adapters_store.archive import ArchiveSink, unpack
from adapters_store.archive_member import MAX_MEMBERS, parts_of
from adapters_store.errors import DiskFull, FileRefused, TooLarge, UnsafeArchive, UploadRefused
from adapters_store.staging import Stage, StageLimits, check_path
from tests.adapters_store.hostile.packing import TarEntry, ZipEntry, sound, sound_tar, sound_zip, tar, zip_of, zipped

LIMITS = StageLimits(max_file_bytes=2**16, max_total_bytes=2**17, reserve_bytes=0)
LONG = "a" * 99 + "/" + "b" * 99 + "/"
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Unpacked:
    """What became of an archive's bytes."""

    def __init__(self, folder: Path, body: bytes, limits: StageLimits = LIMITS) -> None:
        with Stage(folder / "stage", limits) as stage:
            archive = ArchiveSink(stage, len(body))
            archive.write(body)
            self.left_out = unpack(archive, stage)
            self.files = {file.path: stage.path_of(file.path).read_bytes() for file in stage.files}
            self.on_disk = {path.name for path in stage.directory.rglob("*")}


def by_tarfile(format_: int, folder: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=format_) as archive:
        for name, data in sound().items():
            entry = tarfile.TarInfo(folder + name)
            entry.size, entry.mtime = len(data), 1.5
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def by_zipfile(method: int, folder: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.mkdir("a folder")
        for name, data in sound().items():
            archive.writestr(folder + name, data)
        archive.comment = b"made by hand"
    return packed.getvalue()


def zip_as_a_stream() -> bytes:
    """As a packer writes it that cannot go back: sizes stand behind the data."""

    class OneWay(io.RawIOBase):
        def __init__(self) -> None:
            self.taken = b""

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.taken += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    target = OneWay()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sound().items():
            archive.writestr(name, data)
    return target.taken


@pytest.mark.parametrize(
    "body",
    [
        *[by_tarfile(kind, folder) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT) for folder in ("", LONG, "é/")],
        by_tarfile(tarfile.USTAR_FORMAT, "./out/" + "u" * 90 + "/"),
        *[by_zipfile(method, folder) for method in (0, 8) for folder in ("", LONG, "é/")],
        zip_as_a_stream(),
        zipped(sound_tar()[:1000]) + zipped(sound_tar()[1000:]) + bytes(300),
        sound_tar() + bytes(20 * 512),
    ],
)  # fmt: skip
def test_archives_of_common_packers_are_read(tmp_path: Path, body: bytes) -> None:
    found = Unpacked(tmp_path, body)
    assert found.files == sound()
    assert found.on_disk == set(sound())
    assert found.left_out == []


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax"])
def test_archives_of_tar_itself_are_read(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out" / "sql"
    folder.mkdir(parents=True)
    for name, data in sound().items():
        (folder / name).write_bytes(data)
    subprocess.run(["tar", f"--format={kind}", "-czf", "x.tgz", "out"], cwd=tmp_path, check=True)
    assert Unpacked(tmp_path, (tmp_path / "x.tgz").read_bytes()).files == sound()


def test_what_macos_adds_is_left_out(tmp_path: Path) -> None:
    found = Unpacked(tmp_path, sound_tar(TarEntry("sql/._README.md", b"x"), TarEntry(".DS_Store", b"y"), folder="sql/"))
    assert (found.files, found.left_out) == (sound(), ["sql/._README.md", ".DS_Store"])


def test_caps_count_what_comes_out(tmp_path: Path) -> None:
    fits = TarEntry("tokenizer.model", bytes(60_000))
    assert "tokenizer.model" in Unpacked(tmp_path, zipped(sound_tar(fits))).files
    more = TarEntry("README.md", bytes(60_000))
    for body in (
        sound_tar(fits, more, TarEntry("tokenizer.json", bytes(20_000))),
        sound_zip(ZipEntry("tokenizer.json", bytes(70_000))),
    ):
        with pytest.raises(TooLarge):
            Unpacked(tmp_path, body)


def test_an_archive_over_the_cap_is_refused_before_its_first_byte_and_while_it_comes(tmp_path: Path) -> None:
    with Stage(tmp_path / "stage", LIMITS) as stage, pytest.raises(TooLarge):
        ArchiveSink(stage, 2**33)
    with Stage(tmp_path / "stage", LIMITS) as stage:
        archive = ArchiveSink(stage)
        with pytest.raises(TooLarge):
            write_pieces(archive, 100 * [2**16])
        archive.close()


def test_the_disk_is_looked_at_while_an_archive_of_unknown_size_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Stage(tmp_path / "stage", StageLimits(reserve_bytes=0)) as stage:
        archive = ArchiveSink(stage)
        monkeypatch.setattr(Stage, "SPACE_CHECK_BYTES", 2**16)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=-1))
        with pytest.raises(DiskFull):
            write_pieces(archive, 3 * [2**15])
        archive.close()


@pytest.mark.parametrize(
    "body",
    [
        zipped(sound_tar() + bytes(8 * 2**20)),
        zipped(sound_tar(TarEntry("tokenizer.model", bytes(8 * 2**20)))),
        sound_zip(ZipEntry("tokenizer.model", bytes(8 * 2**20))),
        sound_tar(TarEntry("pax", b"", b"x", size=b"07777777777\0")),
        zipped(tar(TarEntry("pax", b"", b"x", size=b"07777777777\0"), end=bytes(8 * 2**20))),
    ],
)
def test_a_bomb_never_gets_much_memory(tmp_path: Path, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UploadRefused):
            Unpacked(tmp_path, body)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def write_pieces(archive: ArchiveSink, sizes: list[int]) -> None:
    for size in sizes:
        archive.write(bytes(size))


def test_as_many_members_as_there_may_be(tmp_path: Path) -> None:
    folders = [TarEntry(f"{number}/", kind=b"5") for number in range(MAX_MEMBERS - 2)]
    assert Unpacked(tmp_path, zipped(sound_tar(*folders))).files == sound()
    with pytest.raises(UnsafeArchive):
        Unpacked(tmp_path, zipped(sound_tar(*folders, folders[0])))


def test_two_adapters_in_one_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="one adapter"):
        Unpacked(tmp_path, sound_zip(ZipEntry("other/README.md", b"x")))


@given(st.text(max_size=60) | st.binary(max_size=60))
def test_no_path_that_is_taken_climbs(path: str | bytes) -> None:
    try:
        parts = parts_of(path)
    except UploadRefused:
        return
    assert not {"", ".", ".."} & set(parts)
    assert all("/" not in part and "\\" not in part and part.isprintable() for part in parts)


PATHS = st.text(max_size=40) | st.sampled_from(
    [f"{folder}{name}" for folder in ("", "../", "/", "a/", "./", "a/../") for name in (*sound(), "README.md", "x.bin")]
)
TAR_KINDS = st.sampled_from([b"0", b"\0", b"5", b"1", b"2", b"S", b"x", b"g", b"L", b"7", b"Z"])


@FEW
@given(st.lists(st.tuples(PATHS, TAR_KINDS, st.binary(max_size=700)), max_size=6))
def test_of_any_tar_nothing_but_files_of_an_adapter_comes_out(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, bytes]]
) -> None:
    body = tar(*[TarEntry(_utf8(path), data, kind) for path, kind, data in members])
    check_outcome(tmp_path_factory, body)


@FEW
@example([(".", 0, b"")])
@given(st.lists(st.tuples(PATHS, st.integers(0, 0xFFFF), st.binary(max_size=700)), max_size=6))
def test_of_any_zip_nothing_but_files_of_an_adapter_comes_out(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int, bytes]]
) -> None:
    body = zip_of(*[ZipEntry(_utf8(path), data, mode) for path, mode, data in members])
    check_outcome(tmp_path_factory, body)


SOUND: dict[str, Callable[[], bytes]] = {"tar": sound_tar, "gzip": lambda: zipped(sound_tar()), "zip": sound_zip}


@pytest.mark.parametrize("kind", list(SOUND))
@FEW
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_changes_no_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    body = bytearray(SOUND[kind]())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if how == "set":
            body[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del body[place : place + data.draw(st.integers(1, 600))]
        elif how == "insert":
            body[place:place] = data.draw(st.binary(min_size=1, max_size=600))
        else:
            body[place:place] = body[place : place + 512]
        if not body:
            break
    check_outcome(tmp_path_factory, bytes(body))


@FEW
@given(st.sampled_from([b"", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"PK\x03\x04", b"PK\x05\x06"]), st.binary(max_size=2000))
def test_any_bytes_at_all_are_refused(tmp_path_factory: pytest.TempPathFactory, head: bytes, body: bytes) -> None:
    check_outcome(tmp_path_factory, head + body)


def check_outcome(factory: pytest.TempPathFactory, body: bytes) -> None:
    """Refused, or plain files of an adapter; nothing anywhere else, and the stage is gone."""
    with new_folder(factory) as folder:
        try:
            found = Unpacked(folder / "one" / "two", body)
        except UploadRefused:
            assert [path.name for path in folder.rglob("*")] == ["one", "two"]
            return
        assert all(check_path(name) == name for name in found.files)
        assert found.on_disk == set(found.files)
        assert [path.name for path in folder.rglob("*")] == ["one", "two"]


@contextmanager
def new_folder(factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = factory.mktemp("archive")
    (path / "one" / "two").mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
