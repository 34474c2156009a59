"""What the rack should look like, as the aggregator writes it and every agent follows it. Pure.

One object in the bucket; its generation rises with every change. A node that it names serves exactly the models that
are assigned to it; a node that it does not name is left alone.
"""

import msgspec

from shared.errors import Refused
from shared.keys import check_name

SCHEMA = 1


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a node: the served name ``model``, and ``version`` of ``source`` under models/ in the bucket.

    Settings that are None are the node's own for that name, or the defaults of agent.toml.
    """

    model: str
    source: str
    version: str
    pinned: bool = False
    rows: int | None = None
    plan_context_tok: int | None = None
    cache_bytes: int | None = None
    keep_alive_s: float | None = None


class DesiredPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the rack and where it is found."""

    id: str
    url: str


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` holds the assignments of each node by its id; ``note`` says why, for people. ``peers``, where there
    are any, are all nodes of the rack, and take the place of those in agent.toml."""

    schema: int = SCHEMA
    generation: int
    written_ms: int = 0
    note: str = ""
    nodes: dict[str, tuple[Assignment, ...]] = {}
    peers: tuple[DesiredPeer, ...] = ()


def parse(raw: bytes) -> DesiredState:
    """Read and check. Raises Refused; fields of a newer aggregator are passed over."""
    try:
        desired = msgspec.json.decode(raw, type=DesiredState)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"desired state: {error}", code="bad_desired") from None
    if desired.schema != SCHEMA:
        raise Refused(f"desired state: schema {desired.schema}, this agent reads {SCHEMA}", code="bad_desired")
    if desired.generation < 1:
        raise Refused("desired state: its generation is below 1", code="bad_desired")
    for node, assignments in desired.nodes.items():
        _check(node, assignments)
    _check_peers(desired.peers)
    return desired


def encode(desired: DesiredState) -> bytes:
    """The object as it is stored."""
    return msgspec.json.format(msgspec.json.encode(desired), indent=1)


def _check(node: str, assignments: tuple[Assignment, ...]) -> None:
    names = [one.model for one in assignments]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"desired state: node {node} is assigned {name} twice", code="bad_desired")
    for one in assignments:
        for value in (one.rows, one.plan_context_tok):
            if value is not None and value < 1:
                raise Refused(f"desired state: {one.model} on {node}: a setting below 1", code="bad_desired")
        try:
            check_name(one.model, "model")
            check_name(one.source, "source")
            check_name(one.version, "version")
        except Refused as error:
            raise Refused(f"desired state: node {node}: {error.message}", code="bad_desired") from None


def _check_peers(peers: tuple[DesiredPeer, ...]) -> None:
    for what, values in (("id", [p.id for p in peers]), ("url", [p.url.rstrip("/") for p in peers])):
        for value in values:
            if values.count(value) > 1:
                raise Refused(f"desired state: two peers have the {what} {value}", code="bad_desired")
    for peer in peers:
        try:
            check_name(peer.id, "id")
        except Refused as error:
            raise Refused(f"desired state: peers: {error.message}", code="bad_desired") from None
        if not peer.url.startswith(("http://", "https://")):
            raise Refused(f"desired state: peer {peer.id}: its url begins with http:// or https://", code="bad_desired")
