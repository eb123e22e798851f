"""A server on loopback that speaks the Hub's protocol, as far as fetching an adapter needs it.

    GET /api/models/<org>/<repo>[/revision/<rev>]      commit, files, sizes, sha256 of large files
    GET /<org>/<repo>/resolve/<commit>/<path>          a small file; a large one redirects to another host

Large files are kept by a second server, as the Hub's are, which says who sent it a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    files: Mapping[str, bytes]
    commit: str = "c0ffee" * 6 + "beef"
    revisions: tuple[str, ...] = ("main", "v2", "refs/pr/3")
    token: str | None = None  # a private one
    is_gated: bool = False
    moved_to: str | None = None
    wrong_digest: bool = False


@dataclass
class Asked:
    server: str  # "hub" or "store"
    path: str
    token: str | None
    range: str | None


@dataclass
class LoopbackHub:
    """`with LoopbackHub({"org/sql": Repo(...)}) as hub: ...hub.url`"""

    repos: dict[str, Repo]
    cut_at: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which an answer breaks off, once
    stall: threading.Event | None = None  # large files wait for it after their first kilobyte
    status: int | None = None  # every answer, when set
    ignores_ranges: bool = False
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> LoopbackHub:
        self._store = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "store"))
        self._hub = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "hub"))
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self._servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stall is not None:
            self.stall.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://localhost:{self._hub.server_address[1]}"

    @property
    def store_url(self) -> str:
        return f"http://127.0.0.1:{self._store.server_address[1]}"

    @property
    def _servers(self) -> list[ThreadingHTTPServer]:
        return [self._store, self._hub]


def _handler(hub: LoopbackHub, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(_Requests):
        pass

    Handler.hub, Handler.server_name = hub, name
    return Handler


class _Requests(BaseHTTPRequestHandler):
    hub: LoopbackHub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silence."""

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(Asked(self.server_name, path, token, self.headers.get("Range")))
        if self.hub.status is not None:
            self._answer(self.hub.status, b"{}")
        elif self.server_name == "store":
            self._send_file(path.removeprefix("/"))
        elif path.startswith("/api/models/"):
            self._send_repo(path.removeprefix("/api/models/"))
        else:
            self._send_content(path)

    def _repo(self, name: str) -> Repo | None:
        """The repository that this caller may see; else the answer is given."""
        repo = self.hub.repos.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and repo.token != token):
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        return repo

    def _send_repo(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repo = self._repo(name)
        if repo is None:
            return
        if repo.moved_to is not None:
            self._answer(307, b"", {"Location": self.path.replace(name, repo.moved_to)})
        elif revision and revision not in (*repo.revisions, repo.commit):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [self._sibling(repo, path, content) for path, content in repo.files.items()]
            self._answer(200, json.dumps({"id": name, "sha": repo.commit, "siblings": files}).encode())

    def _sibling(self, repo: Repo, path: str, content: bytes) -> dict[str, Any]:
        sibling: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
        if path.endswith(LARGE):
            digest = hashlib.sha256(b"" if repo.wrong_digest else content).hexdigest()
            sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return sibling

    def _send_content(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        repo = self._repo(name)
        if repo is None:
            return
        commit, _, file = rest.partition("/")
        if repo.is_gated:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif commit != repo.commit or file not in repo.files:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(LARGE):
            self._answer(302, b"", {"Location": f"{self.hub.store_url}/{name}/{file}"})
        else:
            self._answer(200, repo.files[file])

    def _send_file(self, path: str) -> None:
        org, repo, file = path.split("/", 2)
        content = self.hub.repos[f"{org}/{repo}"].files[file]
        start = 0
        if self.headers.get("Range") and not self.hub.ignores_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cuts = self.hub.cut_at.get(file)
        if cuts:
            self.wfile.write(content[start : max(start, cuts.pop(0))])
            self.close_connection = True
            return
        self.wfile.write(content[start : start + 1024])
        if self.hub.stall is not None:
            self.wfile.flush()
            self.hub.stall.wait(20)
        with contextlib.suppress(ConnectionError):  # a client that had enough
            self.wfile.write(content[start + 1024 :])

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
