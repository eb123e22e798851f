"""An https server on loopback with a certificate of its own, for the hosts `localhost` and `models.test`."""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOSTS = ("localhost", "models.test", "other.test")


def write_certificate(path: Path) -> Path:
    """One PEM with a fresh key and a certificate that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    names = [x509.DNSName(host) for host in HOSTS]
    addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@dataclass
class LoopbackWeb:
    """`with LoopbackWeb(certificate, {"/sql/adapter_config.json": b"{}"}) as web: ...web.port`"""

    certificate: Path
    files: dict[str, bytes]
    redirects: dict[str, str] = field(default_factory=dict)  # path -> Location
    token: str | None = None
    headers: dict[str, str] = field(default_factory=dict)  # of every answer
    cut: bool = False  # bodies break off in the middle
    replace_after_listing: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # (method, path, Authorization)

    def __enter__(self) -> LoopbackWeb:
        class Handler(_Requests):
            web = self

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that do not trust the certificate, or leave in the middle, are what is tested."""


class _Requests(BaseHTTPRequestHandler):
    web: LoopbackWeb
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silence."""

    def do_HEAD(self) -> None:
        self._send(has_body=False)

    def do_GET(self) -> None:
        self._send(has_body=True)

    def _send(self, has_body: bool) -> None:
        web = self.web
        web.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if self.path in web.redirects:
            self._answer(302, b"", {"Location": web.redirects[self.path]})
        elif web.token is not None and self.headers.get("Authorization") != f"Bearer {web.token}":
            self._answer(401, b"")
        elif self.path.partition("?")[0] not in web.files:
            self._answer(404, b"")
        else:
            content = web.files[self.path.partition("?")[0]]
            if has_body and web.replace_after_listing:
                content += b" "
            self._answer(200, content, has_body=has_body)

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, has_body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in {**self.web.headers, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if has_body and self.web.cut:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif has_body:
                self.wfile.write(body)
