"""A real HTTP server over a front without an engine, for those who need a socket and not a model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any, cast

import httpx
import uvicorn

from adapters_store.staging import StageLimits
from server.api.app import create_app
from server.front.front import Front
from server.loader.job import Loader
from server.settings import Settings
from tests.api.conftest import safetensors_bytes
from tests.api.fake_front import FakeFront


class FakeServer:
    """A real HTTP server over a front without an engine, in a thread of its own."""

    def __init__(
        self,
        root: Path,
        settings: Settings | None = None,
        *,
        loader: Loader | None = None,
        limits: StageLimits | None = None,
    ) -> None:
        self._root = root
        self._settings = settings or Settings()
        self._loader, self._limits = loader, limits
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    async def _run(self) -> None:
        front = await FakeFront.start(self._root, loader=self._loader, limits=self._limits)
        app = create_app(self._settings, cast(Front, front))
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        await self._server.serve(sockets=[self._listener])
        await front.close()


def upload(url: str, name: str) -> None:
    files: list[Any] = [
        ("metadata", (None, json.dumps({"name": name}))),
        ("files", ("adapter_config.json", b"{}")),
        ("files", ("adapter_model.safetensors", safetensors_bytes())),
    ]
    assert httpx.post(url + "/admin/v1/adapters", files=files).status_code in (200, 201)
