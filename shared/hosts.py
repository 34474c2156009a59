"""Hosts, addresses and networks as a configuration names them. Pure."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

Network = IPv4Network | IPv6Network


def host_of(url: str) -> str:
    """The host of a URL in lower case; "" when it has none, or names a user or no valid port, which no node's does. Nor
    has one a ``%``: a client may decode it to another host, or take it for a zone of this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        odd = parts.username is not None or parts.port == 0 or parts.scheme not in ("http", "https")
    except ValueError:
        return ""
    return "" if odd or "%" in host else host.rstrip(".").lower()


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether ``host`` is reachable from this machine only: a loopback address, also one of IPv4 in IPv6, or
    ``localhost``. What a resolver may take for an address (``127.1``, ``0``, ``2130706433``) is none."""
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".") == "localhost"
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (inner or address).is_loopback


def address_of(text: str) -> IPv4Address | IPv6Address | None:
    """An address, without brackets and zone; one of IPv4 that is written as IPv6 is the former. None for a name."""
    try:
        found = ip_address(text.strip().removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


@lru_cache(maxsize=64)
def networks_of(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Those that are an address or a network."""
    return tuple(network for text in texts if (network := _network(text)) is not None)


def not_networks(texts: Iterable[str]) -> list[str]:
    """Those that are neither an address nor a network."""
    return [text for text in texts if _network(text) is None]


def within(text: str, texts: Sequence[str]) -> bool:
    """Whether an address lies in one of some networks."""
    address = address_of(text)
    return address is not None and any(address in network for network in networks_of(tuple(texts)))


def permitted(host: str, allowed: Sequence[str]) -> bool:
    """Whether a host is one of the names, below one of the domains (``.rack.example``) or in one of the networks."""
    if not host:
        return False
    names = [one.rstrip(".").lower() for one in allowed]
    below = any(name.startswith(".") and host.endswith(name) and len(host) > len(name) for name in names)
    return host in names or below or within(host, allowed)


def _network(text: str) -> Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None
