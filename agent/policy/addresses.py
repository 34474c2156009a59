"""Where a provider may be: which addresses are on the premises, and which are outside. Pure.

A provider on the premises is reached at private addresses only, so that no name leads a request out of the house. One
outside is reached at public addresses only, so that no name leads a request, with its key, to a machine of the house.
"""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal

from shared.hosts import host_of

Category = Literal["premises", "outside"]
Address = IPv4Address | IPv6Address
_PRIVATE = tuple(
    map(
        ip_network,
        (
            *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16"),
            *("::1/128", "fc00::/7", "fe80::/10"),
        ),
    )
)
"""RFC 1918, loopback, link-local, unique local. Shared addresses (100.64.0.0/10) are not among them: carriers use them,
and overlay networks whose machines are anywhere."""
_METADATA = frozenset(map(ip_address, ("169.254.169.254", "169.254.170.2", "fd00:ec2::254")))
"""Where clouds tell a machine its credentials."""
_NAT64 = ip_network("64:ff9b::/96")
_TUNNELS = tuple(map(ip_network, ("2002::/16", "2001::/32", "::/96", "fec0::/10", "64:ff9b:1::/48")))
"""Addresses of IPv6 that stand for one of IPv4, or for nothing any more."""
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?", re.IGNORECASE)


class Misplaced(OSError):
    """A host that is not where its category has to be."""


def unfit(address: str, category: Category) -> str:
    """Why a provider of this category may not be reached at an address, as text, perhaps with a zone; "" if it may."""
    try:
        found = _plain(ip_address(address.partition("%")[0]))
    except ValueError:
        return f"{address!r} is not an address"
    private = any(found in network for network in _PRIVATE if network.version == found.version)
    if found in _METADATA or found.is_multicast or found.is_unspecified or (found.is_reserved and not private):
        return f"{found} is not the address of one machine"
    if category == "premises":
        return "" if private else f"{found} is not a private address (kind local is for the premises)"
    tunnel = any(found in network for network in _TUNNELS if network.version == found.version)
    if private or tunnel or not found.is_global:
        return f"{found} is not a public address (only kind local is reached on the premises)"
    return ""


def unfit_url(url: str, category: Category) -> str:
    """What of a provider's URL can be told to be wrong without asking a name server; "" if nothing. A query, a fragment
    or a user in it is wrong; so is a number that a resolver takes for an address, like 2130706433 or 0x7f.1."""
    host = host_of(url)
    if not host or not url.isascii() or any(one.isspace() or one in "?#\\" for one in url):
        return "must be https:// or http://, a host, perhaps a port and a path, and nothing else"
    if is_number(host):
        return "must name its host, or give its address in the usual form, like 192.168.1.20"
    return unfit(host, category) if is_address(host) else ""


def is_address(host: str) -> bool:
    """Whether a host is an address in its usual form."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_number(host: str) -> bool:
    """Whether resolvers may take a host that is not an address in its usual form for one: its last part is a number."""
    return not is_address(host) and _NUMBER.fullmatch(host.rpartition(".")[2] or host) is not None


def _plain(address: Address) -> Address:
    """One of IPv4 that is written as IPv6, or reached through NAT64, is the former."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address
    return address
