"""A directory that is watched: what is dropped into it is taken once it is whole, and refusals are not repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters_store.staging import StageLimits
from server.library.gate import Gate, GoldenPrompt
from server.library.library import Library
from server.library.watch import DirectoryWatch
from tests.api.conftest import safetensors_bytes
from tests.api.fake_front import FakeLoader

Test = Callable[[Library, DirectoryWatch, Path], Coroutine[Any, Any, None]]


def drop(root: Path, name: str, config: str = '{"r": 4}') -> None:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(config)
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes())


@pytest.fixture
def watching(tmp_path: Path) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def inside() -> None:
            root = tmp_path / "dropped"
            root.mkdir()
            limits = StageLimits(max_file_bytes=10**6, max_total_bytes=10**6, reserve_bytes=0)
            library = await Library.open(tmp_path / "store", FakeLoader(), limits=limits)
            try:
                await test(library, DirectoryWatch(library, root), root)
            finally:
                await library.close()

        asyncio.run(asyncio.wait_for(inside(), 60))

    return run


def test_what_is_dropped_is_taken_at_the_second_look(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        assert await watch.look() == []
        drop(root, "sql")
        assert await watch.look() == [], "it may still be written"
        assert await watch.look() == ["sql"]
        assert library.look_up("sql").version == 1
        assert await watch.look() == []

    watching(test)


def test_one_that_grows_is_waited_for(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        await watch.look()
        for rank in range(4):
            drop(root, "sql", f'{{"r": 4, "note": "{"x" * rank}"}}')
            assert await watch.look() == []
        assert await watch.look() == ["sql"]

    watching(test)


def test_changed_files_make_a_new_version(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        await watch.look()
        drop(root, "org/sql")
        await watch.look()
        await watch.look()
        drop(root, "org/sql", '{"r": 16}')
        await watch.look()
        assert await watch.look() == ["org/sql"]
        assert library.look_up("org/sql").version == 2

    watching(test)


def test_a_refused_one_is_tried_again_when_it_changes_and_not_before(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        await watch.look()
        drop(root, "sql", '{"use_strange": true}')
        num_tries = 0
        register = library.register

        async def counted(directory: Any) -> Any:
            nonlocal num_tries
            num_tries += 1
            return await register(directory)

        library.register = counted  # type: ignore[method-assign]
        for _ in range(5):
            assert await watch.look() == []
        assert num_tries == 1
        assert (await library.show("sql")).failure is not None
        drop(root, "sql")
        await watch.look()
        assert await watch.look() == ["sql"]

    watching(test)


def test_a_directory_that_vanishes_stops_nothing(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        drop(root, "sql")
        await library.discover(root)
        await watch.look()
        await asyncio.to_thread(root.rename, root.with_name("elsewhere"))
        assert await watch.look() == []
        assert library.look_up("sql").version == 1

    watching(test)


def test_a_gate_holds_back_what_a_directory_brings_and_stops_no_start(watching: Callable[[Test], None]) -> None:
    async def test(library: Library, watch: DirectoryWatch, root: Path) -> None:
        drop(root, "sql")
        await library.discover(root)
        await library.releases.set_gate("sql", "default", Gate((GoldenPrompt("a"),)))
        drop(root, "sql", '{"r": 16}')
        found = await library.discover(root)  # nobody can answer golden prompts yet
        assert "gate" in found.failed["sql"]
        assert library.look_up("sql").version == 1
        assert library.look_up("sql@2").version == 2

        async def answer(reference: str, prompt: GoldenPrompt) -> str:
            return "fine"

        library.releases.answer = answer
        await library.releases.move("sql", "default", {2: 1})
        assert library.look_up("sql").version == 2

    watching(test)
