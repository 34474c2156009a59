"""Which connections may be plain HTTP, and the files of TLS. Pure."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.hosts import host_of, is_loopback, not_networks

_HELP = "`mlxrack-agent help tls`"


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files of TLS in PEM, read again when they change (docs/tls.md). ``certificate``, with its chain, and ``key`` are
    what clients see; ``ca`` is the rack's certificate authority, and with it nodes require each other's certificates.
    ``node_certificate`` and ``node_key`` are this node's own, where clients see another one, of a public CA."""

    certificate: Annotated[str, Meta(description="required with `key` or `ca`")] = ""
    key: Annotated[str, Meta(description="required with `certificate`")] = ""
    ca: Annotated[str, Meta(description="required with `node_certificate`")] = ""
    node_certificate: Annotated[str, Meta(description="required with `node_key`")] = ""
    node_key: Annotated[str, Meta(description="required with `node_certificate`")] = ""


def check_tls(tls: Tls) -> list[str]:
    """What is missing beside what is configured."""
    found = []
    pairs = [("certificate", "key"), ("node_certificate", "node_key")]
    for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
        if getattr(tls, one) and not getattr(tls, other):
            found.append(f"tls.{other}: is required with tls.{one}")
    if tls.ca and not tls.certificate:
        found.append("tls.certificate: is required with tls.ca; `mlxrack-agent tls issue` makes a node's")
    if tls.node_certificate and not tls.ca:
        found.append("tls.ca: is required with tls.node_certificate; it is the CA of all nodes' certificates")
    return found


def check_listen(host: str, proxies: Sequence[str], tls: Tls, *, insecure: bool) -> list[str]:
    """An address that other machines reach by plain HTTP, and proxies that are no addresses."""
    found = [
        f"listen.trusted_proxies: {text!r} is neither an address nor a network, like 10.0.0.5 or 10.0.0.0/24"
        for text in not_networks(proxies)
    ]
    if not (is_loopback(host) or tls.certificate or insecure):
        why = f"{host} is reachable from other machines, and API keys and prompts would be sent in clear"
        found.append(f"listen.host: {why}; configure [tls] ({_HELP}), or set listen.insecure_http = true")
    return found


def plain_url(url: str, tls: Tls, *, insecure: bool) -> str:
    """Why a peer must not be called at ``url``; "" when it may be."""
    if url.startswith("https://"):
        return "" if tls.ca else f"https:// between nodes needs [tls] with certificate, key and ca ({_HELP})"
    if not url.startswith("http://") or insecure:
        return ""
    if tls.ca:
        return "must begin with https://, because this node has tls.ca; or set listen.insecure_http = true"
    if is_loopback(host_of(url)):
        return ""
    return f"prompts would be sent in clear; use https:// with [tls] ({_HELP}), or set listen.insecure_http = true"


def plain_warnings(host: str, peers: Sequence[tuple[str, str]], tls: Tls, *, insecure: bool) -> list[str]:
    """What a running node sends in clear because it is allowed to, a sentence each. ``peers`` are (id, url)."""
    found = []
    if insecure and tls.certificate:
        found.append("listen.insecure_http is set beside [tls]; remove it when all peers' urls begin with https://")
    if not (tls.certificate or is_loopback(host)):
        found.append(f"clients reach {host} by plain HTTP: API keys and prompts can be read on the network")
    if plain := [node for node, url in peers if not (url.startswith("https://") or is_loopback(host_of(url)))]:
        found.append(f"requests to {', '.join(plain)} use plain HTTP: they can be read and changed on the network")
    return found
