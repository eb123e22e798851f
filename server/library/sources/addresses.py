"""Which address a host stands for, decided once: a name must not lead into the server's own network.

A name is resolved here, every address is judged, and the connection goes to exactly an address that passed. Nobody
asks the resolver again, so that a name which means something else a moment later gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any

from server.library.errors import SourceForbidden, SourceUnavailable
from server.library.sources.policy import Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[Any]]

# Set aside for protocols, relays and examples; releases of Python differ in what they know of these.
_SET_ASIDE = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "fec0::/10")
)
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")


def resolve(host: str, port: int) -> list[Any]:
    """As `socket.getaddrinfo` for TCP."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def find_addresses(host: str, port: int, networks: Iterable[Network], lookup: Resolve = resolve) -> list[str]:
    """The addresses to connect to, the resolver's favourite first.

    Raises:
        SourceForbidden: one of the host's addresses is not public, and in none of `networks`.
        SourceUnavailable: there is no such host.
    """
    try:
        found = [str(entry[4][0]) for entry in lookup(host, port)]
    except (OSError, UnicodeError) as error:
        raise SourceUnavailable(f"the host {host!r} is not known: {error}") from error
    if not found:
        raise SourceUnavailable(f"the host {host!r} has no address.")
    allowed = tuple(networks)
    # All of them: a name with one public and one private address is a trick, or will become one.
    if not all(_may_be_reached(ipaddress.ip_address(address.partition("%")[0]), allowed) for address in found):
        raise SourceForbidden(
            f"the host {host!r} has an address that is not public. Where that is meant, the server is started with "
            "--https-source-networks naming its network."
        )
    return list(dict.fromkeys(found))


def is_public(address: Address) -> bool:
    """Whether an address is somebody's on the internet, whichever way it is written."""
    inner = _inner(address)
    if inner is not None:
        return is_public(inner)
    if any(address in network for network in _SET_ASIDE):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _may_be_reached(address: Address, networks: tuple[Network, ...]) -> bool:
    plain = getattr(address, "ipv4_mapped", None) or address
    return is_public(address) or any(plain in network for network in networks)


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one wraps, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if any(address in network for network in _NAT64) or int(address) >> 32 == 0:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _SIX_TO_FOUR:
        return address.sixtofour
    return None
