"""Where the server listens."""

from __future__ import annotations

from pathlib import Path

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import Words


class NetworkSettings(SettingGroup):
    heading = "Network"

    host: str | None = setting(
        None,
        "Address to listen on. Default: 0.0.0.0 when an API key or a keys file is set, else 127.0.0.1, so that a "
        "server without a key is never open to the network by accident.",
        metavar="ADDRESS",
    )
    port: int = setting(8000, "Port to listen on; 0 takes a free one and prints it.", ge=0, le=65535)
    admin_port: int | None = setting(
        None, "Port of the /admin routes, which are then on no other port. Default: --port.", ge=1, le=65535
    )
    root_path: str = setting("", "Path prefix that a proxy in front of the server strips.")
    ssl_keyfile: Path | None = setting(None, "Private key (PEM) for HTTPS.")
    ssl_certfile: Path | None = setting(None, "Certificate chain (PEM) for HTTPS.")
    cors_allow_origin: Words = setting(
        (),
        "Origin whose web pages may call this server, e.g. https://app.example; repeatable.",
        metavar="ORIGIN",
    )
    keep_alive_s: float = setting(
        15.0, "Seconds of silence after which a stream sends a comment, so that no proxy closes it.", gt=0
    )
