"""Which node a certificate is of: its URI ``mlxrack://RACK/NODE``. Pure.

A host name says where a node is reached today; its id is what the configuration, the signatures and the routing mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PEER_DOMAIN = ".peer.mlxrack.internal"
"""The end of the server names that nodes ask each other for: a listener may show clients another certificate."""
_LABEL = 62
SCHEME = "mlxrack://"


def uri_of(rack: str, node: str) -> str:
    """The name of a node in its certificate."""
    return f"{SCHEME}{rack}/{node}"


def server_name(node: str) -> str:
    """The server name with which a node is called: its id in hex, because a DNS name has no case and fewer letters."""
    digits = node.encode().hex()
    return ".".join(digits[n : n + _LABEL] for n in range(0, len(digits), _LABEL)) + PEER_DOMAIN


def called_node(name: str | None) -> str:
    """The inverse of ``server_name``; "" for any other name."""
    if name is None or not name.endswith(PEER_DOMAIN):
        return ""
    try:
        return bytes.fromhex(name.removesuffix(PEER_DOMAIN).replace(".", "")).decode()
    except ValueError:
        return ""


def names_of(certificate: Mapping[str, Any] | None) -> Sequence[str]:
    """The nodes that a verified certificate, as ``ssl`` describes it, is of."""
    alternatives = (certificate or {}).get("subjectAltName", ())
    return [value for kind, value in alternatives if kind == "URI" and value.startswith(SCHEME)]


def wrong_certificate(certificate: Mapping[str, Any] | None, rack: str, node: str) -> str:
    """Why a verified certificate is not that of ``node``; "" when it is."""
    if not certificate:
        return "showed no certificate; nodes of this rack need one of their own ([tls] in agent.toml)"
    if uri_of(rack, node) in (names := names_of(certificate)):
        return ""
    if not names:
        return f"its certificate names no node; it needs the URI {uri_of(rack, node)} (`mlxrack-agent tls issue`)"
    return f"its certificate is that of {', '.join(names)}, not of {uri_of(rack, node)}"
