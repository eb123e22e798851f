"""The Hub as a source, against a server on loopback that speaks its protocol and hub clients' own code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters_store.errors import DigestMismatch, DiskFull, FileRefused, TooLarge
from server.library.errors import SourceDenied, SourceError, SourceNotFound, SourceUnavailable
from server.library.sources.policy import SourcePolicy
from tests.library.loopback_hub import LoopbackHub, Repo
from tests.library.source_samples import KEPT, MAX_BYTES, Place, adapter_files, becomes_empty, open_place

Test = Callable[[Place, LoopbackHub], Coroutine[Any, Any, None]]
BIG = 3_000_000


@pytest.fixture(autouse=True)
def no_ambient_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may be logged in to the Hub."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def visit(tmp_path: Path, hub: LoopbackHub, test: Test) -> None:
    async def inside() -> None:
        async with open_place(tmp_path / "store", SourcePolicy(hub_endpoint=hub.url)) as place:
            await test(place, hub)

    with hub:
        asyncio.run(asyncio.wait_for(inside(), 60))


def test_a_revision_becomes_a_commit_that_is_recorded(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        seen: list[tuple[int, int | None, str]] = []
        committed = await place.puller.pull("org/sql@v2", "sql", progress=lambda *told: seen.append(told))
        version = committed.version
        assert (str(version), version.source.uri, version.source.revision) == ("sql@1", "hf://org/sql", Repo({}).commit)
        assert [file.path for file in version.files] == KEPT
        total = sum(file.size for file in version.files)
        assert seen[-1] == (total, total, "validating")
        assert (total, total, "downloading") in seen
        assert place.leftovers() == []
        again = await place.puller.pull("hf://org/sql@refs/pr/3", "sql")
        assert (again.created, again.version.version) == (False, 1)

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=BIG))}), test)


def test_every_file_is_the_commits_and_no_token_goes_to_where_a_redirect_leads(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        await place.puller.pull("huggingface://org/sql", "sql", token="hf_secret")
        contents = [asked for asked in hub.asked if "/resolve/" in asked.path]
        assert len(contents) == len(KEPT)
        assert all(f"/resolve/{Repo({}).commit}/" in asked.path for asked in contents)
        assert {asked.token for asked in hub.asked if asked.server == "hub"} == {"Bearer hf_secret"}
        assert {asked.token for asked in hub.asked if asked.server == "store"} == {None}

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(), token="hf_secret")}), test)


def test_a_folder_of_a_repository(tmp_path: Path) -> None:
    files = {f"adapters/sql/{name}": content for name, content in adapter_files().items()}

    async def test(place: Place, hub: LoopbackHub) -> None:
        committed = await place.puller.pull("org/all#adapters/sql", "sql")
        assert committed.version.source.uri == "hf://org/all#adapters/sql"
        with pytest.raises(SourceNotFound, match=r"There is one in adapters/sql: name it, as in org/all#adapters/sql"):
            await place.puller.pull("org/all", "sql")

    visit(tmp_path, LoopbackHub({"org/all": Repo(files)}), test)


def test_a_repository_that_moved_is_followed(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        hub.repos["old/sql"] = Repo({}, moved_to="org/sql")
        with pytest.raises(SourceNotFound):  # the list is found under the new name, the contents are not
            await place.puller.pull("old/gone", "sql")
        hub.repos["old/sql"].moved_to = None
        hub.repos["old/sql"].files = adapter_files()
        assert (await place.puller.pull("old/sql", "sql")).created

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files())}), test)


@pytest.mark.parametrize(
    ("repo", "uri", "token", "kind", "words"),
    [
        (Repo({}), "org/nobody", None, SourceNotFound, "there is no repository org/nobody"),
        (Repo(adapter_files(), token="hf_right"), "org/sql", None, SourceNotFound, "or it is private"),
        (Repo(adapter_files(), token="hf_right"), "org/sql", "hf_wrong", SourceNotFound, "or it is private"),
        (Repo(adapter_files()), "org/sql@v9", None, SourceNotFound, "has no revision 'v9'"),
        (Repo(adapter_files(), is_gated=True), "org/sql", None, SourceDenied, "gated"),
        (Repo({"README.md": b""}), "org/sql", None, SourceNotFound, "holds no adapter_config.json"),
        (Repo({"adapter_config.json": b"{}"}), "org/sql", None, SourceNotFound, "holds no adapter_model.safetensors"),
        (
            Repo({"adapter_config.json": b"{}", "adapter_model.bin": b""}),
            "org/sql", None, FileRefused, "looks like a pickle",
        ),
        (Repo(adapter_files(), wrong_digest=True), "org/sql", None, DigestMismatch, "adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_failures_say_what_is_wrong_and_leave_nothing(
    tmp_path: Path, repo: Repo, uri: str, token: str | None, kind: type[Exception], words: str
) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(kind, match=words) as caught:
            await place.puller.pull(uri, "sql", token=token)
        assert place.is_untouched()
        assert "hf_" not in str(caught.value)
        if isinstance(caught.value, SourceError):
            assert hub.url not in str(caught.value)

    visit(tmp_path, LoopbackHub({"org/sql": repo}), test)


def test_what_is_too_large_is_refused_before_a_byte_of_it_is_fetched(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(TooLarge, match="the limit is"):
            await place.puller.pull("org/sql", "sql")
        assert not [asked for asked in hub.asked if "/resolve/" in asked.path]
        assert place.is_untouched()

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=MAX_BYTES + 1))}), test)


def test_a_disk_that_cannot_hold_it_is_told_before_a_byte_of_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=BIG // 2))
        with pytest.raises(DiskFull):
            await place.puller.pull("org/sql", "sql")
        assert not [asked for asked in hub.asked if "/resolve/" in asked.path]
        assert place.is_untouched()

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=BIG))}), test)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path, ignores_ranges: bool) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        hub.cut_at["adapter_model.safetensors"] = [1_200_000, 1_300_000]
        committed = await place.puller.pull("org/sql", "sql")
        (weights,) = [file for file in committed.version.files if file.path == "adapter_model.safetensors"]
        assert weights.size == len(hub.repos["org/sql"].files["adapter_model.safetensors"])
        assert len([asked for asked in hub.asked if asked.range]) >= 2

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=BIG))}, ignores_ranges=ignores_ranges), test)


def test_a_download_that_breaks_off_every_time_is_given_up(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        hub.cut_at["adapter_model.safetensors"] = [100] * 20
        with pytest.raises(SourceUnavailable, match="broke off"):
            await place.puller.pull("org/sql", "sql")
        assert place.is_untouched()

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=BIG))}), test)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_cannot_is_worth_another_try(tmp_path: Path, status: int) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        with pytest.raises(SourceUnavailable, match=str(status)):
            await place.puller.pull("org/sql", "sql")
        assert place.is_untouched()

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files())}, status=status), test)


def test_no_hub_at_all(tmp_path: Path) -> None:
    async def inside() -> None:
        async with open_place(tmp_path / "store", SourcePolicy(hub_endpoint="http://127.0.0.1:9")) as place:
            with pytest.raises(SourceUnavailable, match="does not answer"):
                await place.puller.pull("org/sql", "sql")
            assert place.is_untouched()

    asyncio.run(inside())


def test_a_cancelled_download_leaves_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    async def test(place: Place, hub: LoopbackHub) -> None:
        arrived = asyncio.Event()
        pulling = asyncio.create_task(
            place.puller.pull("org/sql", "sql", progress=lambda done, total, phase: arrived.set() if total else None)
        )
        await arrived.wait()
        pulling.cancel()
        async with asyncio.timeout(3):
            with pytest.raises(asyncio.CancelledError):
                await pulling
        assert hub.stall is not None
        hub.stall.set()
        assert await becomes_empty(place)
        assert place.is_untouched()
        assert (await place.puller.pull("org/sql", "sql")).created

    visit(tmp_path, LoopbackHub({"org/sql": Repo(adapter_files(num_bytes=BIG))}, stall=threading.Event()), test)


def test_offline_takes_what_the_hubs_cache_holds_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Repo({}).commit
    repo = tmp_path / "cache" / "models--org--sql"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name, content in adapter_files().items():
        (repo / "snapshots" / commit / name).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    async def test(hub: LoopbackHub) -> None:
        policy = SourcePolicy(hub_endpoint=hub.url, is_offline=True)
        async with open_place(tmp_path / "store", policy) as place:
            committed = await place.puller.pull("org/sql", "sql")
            assert committed.version.source.revision == commit
            with pytest.raises(SourceUnavailable, match="this server is offline"):
                await place.puller.pull("org/other", "other")
            with pytest.raises(SourceError, match="offline"):
                await place.puller.pull("s3://bucket/sql", "other")
            assert place.leftovers() == []
        assert hub.asked == []

    with LoopbackHub({"org/other": Repo(adapter_files())}) as hub:
        asyncio.run(test(hub))
