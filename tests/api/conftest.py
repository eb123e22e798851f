"""The application over a front without an engine, called in this process."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from server.api.app import create_app
from server.api.service import Service
from server.front.front import Front
from server.settings import Settings
from tests.api.fake_front import FakeFront


class Door:
    """One server in this process: its front, and a client that talks to it over ASGI."""

    def __init__(self, front: FakeFront, client: httpx.AsyncClient, settings: Settings) -> None:
        self.front = front
        self.client = client
        self.settings = settings
        self.app: Any = None
        self.root = Path()

    @property
    def service(self) -> Service:
        found = self.app.state.service
        assert isinstance(found, Service)
        return found

    async def generate(self, inputs: str = "a b c", path: str = "/generate", **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"inputs": inputs, **body})

    async def upload(self, name: str, config: bytes = b'{"r": 4}', **metadata: Any) -> httpx.Response:
        return await self.client.post("/admin/v1/adapters", files=self.parts(name, config, **metadata))

    def parts(self, name: str, config: bytes = b'{"r": 4}', **metadata: Any) -> list[Any]:
        """The parts of a sound upload."""
        return [
            ("metadata", (None, json.dumps({"name": name, **metadata}))),
            ("files", ("adapter_config.json", config)),
            ("files", ("adapter_model.safetensors", safetensors_bytes())),
        ]

    def leftovers(self) -> list[str]:
        """What lies in the store's waiting room."""
        return [path.name for path in (self.root / "staging").iterdir()]


def safetensors_bytes() -> bytes:
    """The smallest sound safetensors file with one tensor."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"\0\0\0\0"


Visit = Callable[..., None]


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    """Runs a coroutine function with a fresh door: `visit(test, api_key="k", max_open=3)`."""

    def run(test: Callable[[Door], Coroutine[Any, Any, None]], max_open: int = 1000, **settings: Any) -> None:
        async def inside() -> None:
            async with OpenDoor(tmp_path / "store", max_open, Settings(**settings)) as opened:
                await test(opened)

        asyncio.run(asyncio.wait_for(inside(), 60))

    return run


class OpenDoor:
    def __init__(self, root: Path, max_open: int, settings: Settings) -> None:
        self._root, self._max_open, self._settings = root, max_open, settings

    async def __aenter__(self) -> Door:
        self._front = await FakeFront.start(self._root, self._max_open)
        app = create_app(self._settings, cast(Front, self._front))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")
        opened = Door(self._front, self._client, self._settings)
        opened.app, opened.root = app, self._root
        return opened

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()
        await self._front.close()
