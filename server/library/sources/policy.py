"""What this server may be asked to fetch. The default allows the Hub and buckets, and nothing of this machine."""

from __future__ import annotations

import fnmatch
import ipaddress
from dataclasses import dataclass
from pathlib import Path

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    roots: tuple[Path, ...] = ()  # paths are taken below these alone
    hub_endpoint: str | None = None  # None: what $HF_ENDPOINT says, else the public Hub
    is_offline: bool = False  # no network: of the Hub only what lies in its local cache
    web_hosts: tuple[str, ...] = ()  # patterns; none: https:// is closed
    web_networks: tuple[Network, ...] = ()  # addresses that are not public and may be reached all the same
    auto_load: tuple[str, ...] = ()  # patterns of `org/name` that a request may bring in

    def takes_host(self, host: str) -> bool:
        """Whether https:// may go there at all; its address is another question."""
        return any(fnmatch.fnmatchcase(host.lower(), pattern.lower()) for pattern in self.web_hosts)

    def loads_by_itself(self, name: str) -> bool:
        """Whether an unknown adapter of this name is fetched from the Hub when a request names it."""
        return name.count("/") == 1 and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.auto_load)
