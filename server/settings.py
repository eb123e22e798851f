"""Every setting of the server, once: flags, environment, config file, `--help` and the README table come from here.

The fields stand in `server.setting_groups`, one file a heading. A field's description is the flag's help text; its
aliases are spellings that other servers use. `server.flags` turns the fields into a command line and layers the
sources. This file knows no source and no process: it says which values exist and which are refused.

Running example: `VENEER_PORT=9000 veneer serve ./llama --max-num-seqs 64`
    settings.model == "./llama"     from the command line
    settings.port  == 9000          from the environment
    settings.bind_host == "127.0.0.1"   no key is set, so nothing beyond this machine is served
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ConfigDict, model_validator

from server.demo import BASE_NAME
from server.limits import cpu_limit
from server.setting_groups.adapters import AdapterSettings
from server.setting_groups.field import SettingGroup
from server.setting_groups.keys import KeySettings
from server.setting_groups.load import LoadSettings
from server.setting_groups.memory import MemorySettings
from server.setting_groups.model import ModelSettings
from server.setting_groups.network import NetworkSettings
from server.setting_groups.observing import ObservingSettings

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
GROUPS: tuple[type[SettingGroup], ...] = (
    ModelSettings,
    NetworkSettings,
    KeySettings,
    AdapterSettings,
    LoadSettings,
    MemorySettings,
    ObservingSettings,
)  # as `--help` shows them


class Settings(
    ModelSettings, NetworkSettings, KeySettings, AdapterSettings, LoadSettings, MemorySettings, ObservingSettings
):
    """One frozen bundle, passed explicitly and never changed; derived values are properties."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="after")
    def _network_settings_fit(self) -> Settings:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("--ssl-keyfile and --ssl-certfile belong together; give both or neither")
        if self.admin_port is not None and self.admin_port == self.port:
            raise ValueError("--admin-port is --port; leave it out, or choose another port for the /admin routes")
        return self

    @model_validator(mode="after")
    def _an_upload_fits_the_stages(self) -> Settings:
        if self.max_staged_bytes < self.max_upload_bytes:
            raise ValueError(
                "--max-staged-bytes is less than --max-upload-bytes, so that no large upload could succeed"
            )
        return self

    @property
    def bind_host(self) -> str:
        if self.host is not None:
            return self.host
        return "0.0.0.0" if self.api_key or self.keys_file else "127.0.0.1"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.bind_host in LOOPBACK_HOSTS or self.bind_host.startswith("127.")

    @property
    def base_name(self) -> str:
        """The base's name as clients see it."""
        if self.served_model_name:
            return self.served_model_name[0]
        if self.model is None:
            return BASE_NAME
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    @property
    def store_path(self) -> Path:
        if self.store_dir is not None:
            return self.store_dir
        data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data_home) / "veneer" / "store"

    @property
    def engine_threads(self) -> int:
        return self.num_threads or cpu_limit()
