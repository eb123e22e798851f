"""Who may call the server."""

from __future__ import annotations

from pathlib import Path

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import Secrets


class KeySettings(SettingGroup):
    heading = "Keys"

    api_key: Secrets = setting((), "Key that clients send as `Authorization: Bearer KEY`; repeatable.", metavar="KEY")
    admin_api_key: Secrets = setting(
        (),
        "Key for /admin routes; repeatable; it also opens everything else. Without one the API keys open them; "
        "without any key they answer only when the server listens on loopback.",
        metavar="KEY",
    )
    keys_file: Path | None = setting(
        None,
        "File of keys that are bound to adapters and to reading, generating or administering; made by `veneer keys`, "
        "read again when it changes. With it, API keys never open the admin routes.",
    )
    share_prefix_cache: bool = setting(
        False,
        "Let all keys reuse each other's cached prompts. By default a key (or a tenant of the keys file) reuses its "
        "own, so that nobody can tell by an answer's speed what others asked.",
    )
