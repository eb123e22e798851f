"""Where the server listens."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from server.setting_groups.field import setting
from server.setting_groups.values import Words


class NetworkSettings(BaseModel):
    host: str | None = setting(
        None,
        "Network",
        "Address to listen on. Default: 0.0.0.0 when an API key or a keys file is set, else 127.0.0.1, so that a "
        "server without a key is never open to the network by accident.",
        metavar="ADDRESS",
    )
    port: int = setting(8000, "Network", "Port to listen on; 0 takes a free one and prints it.", ge=0, le=65535)
    admin_port: int | None = setting(
        None, "Network", "Port of the /admin routes, which are then on no other port. Default: --port.", ge=1, le=65535
    )
    root_path: str = setting("", "Network", "Path prefix that a proxy in front of the server strips.")
    ssl_keyfile: Path | None = setting(None, "Network", "Private key (PEM) for HTTPS.")
    ssl_certfile: Path | None = setting(None, "Network", "Certificate chain (PEM) for HTTPS.")
    cors_allow_origin: Words = setting(
        (),
        "Network",
        "Origin whose web pages may call this server, e.g. https://app.example; repeatable.",
        metavar="ORIGIN",
    )
    keep_alive_s: float = setting(
        15.0, "Network", "Seconds of silence after which a stream sends a comment, so that no proxy closes it.", gt=0
    )
