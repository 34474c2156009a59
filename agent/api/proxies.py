"""Which client a request is of when reverse proxies stand in front. Pure.

Only the proxies in ``listen.trusted_proxies`` are believed: anybody may send X-Forwarded-For. Each proxy appends the
address that it was called from, so the client is the rightmost address that is not a trusted proxy; what stands
left of it is the client's own claim.
"""

from collections.abc import Mapping, Sequence

from shared.hosts import address_of, within

FORWARDED_FOR = "X-Forwarded-For"
FORWARDED_PROTO = "X-Forwarded-Proto"
MOST_HOPS = 32


def client_address(peer_address: str, headers: Mapping[str, str], trusted: Sequence[str]) -> str:
    """The address of the client. ``peer_address`` is the connection's; it stands where no trusted proxy says more, or
    where what it says is not an address."""
    if not within(peer_address, trusted):
        return peer_address
    client = peer_address
    for hop in reversed(_all(headers, FORWARDED_FOR)[-MOST_HOPS:]):
        address = address_of(_without_port(hop))
        if address is None:
            break  # "unknown", or rubbish: whoever is before it remains unknown
        client = str(address)
        if not within(client, trusted):
            break
    return client


def client_scheme(peer_address: str, headers: Mapping[str, str], trusted: Sequence[str], own: str) -> str:
    """http or https: how the client came to the outermost trusted proxy; ``own`` is the listener's scheme."""
    if not within(peer_address, trusted):
        return own
    said = _all(headers, FORWARDED_PROTO)
    return said[-1].lower() if said and said[-1].lower() in ("http", "https") else own


def _all(headers: Mapping[str, str], name: str) -> list[str]:
    """Values of a header that may be repeated, and hold a list each time."""
    getall = getattr(headers, "getall", None)
    lines = getall(name, []) if getall is not None else [headers[name]] if name in headers else []
    return [part.strip() for line in lines for part in line.split(",") if part.strip()]


def _without_port(hop: str) -> str:
    """Some proxies append the client's port."""
    if hop.startswith("["):
        return hop.partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
