"""The desired state: what should be served where. The aggregator writes it, every agent follows it. Pure.

One object in the bucket; its generation increases with every change. A node listed in it serves exactly the models
assigned to it; a node that is not listed is left unchanged.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import Refused
from shared.keys import check_name

SCHEMA = 1
MOST = 1_000_000_000
"""Bound of every number that counts something: far above any that is meant, and nothing that is computed or reported
with it overflows."""
MOST_BYTES = MOST_MS = 1 << 46
"""Bounds of sizes (70 TB) and of times (2,200 years)."""
Count = Annotated[int, Meta(ge=1, le=MOST)]
Moment = Annotated[int, Meta(ge=0, le=MOST_MS)]
"""A time in ms of a stored object, which any calendar can show."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a node: the served name ``model``, and ``version`` of ``source`` under models/ in the bucket.

    Settings that are None fall back to the node's own for that name, then to the defaults of agent.toml.
    """

    model: str
    source: str
    version: str
    pinned: bool = False
    rows: Count | None = None
    plan_context_tok: Count | None = None
    cache_bytes: Annotated[int, Meta(ge=0, le=MOST_BYTES)] | None = None
    keep_alive_s: Annotated[float, Meta(ge=-1, le=MOST)] | None = None


class DesiredPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the rack and its URL."""

    id: str
    url: str


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` holds the assignments by node id; ``note`` is a human-readable reason. ``peers``, where there are any,
    lists all nodes of the rack and replaces the peers of agent.toml. ``rack`` is whose it is, "" where nobody said."""

    schema: Count = SCHEMA
    rack: str = ""
    generation: Count
    written_ms: Moment = 0
    note: str = ""
    nodes: dict[str, tuple[Assignment, ...]] = {}
    peers: tuple[DesiredPeer, ...] = ()


def parse(raw: bytes, *, whole: bool = False) -> DesiredState:
    """Parse and validate. Raises Refused; unknown fields of a newer aggregator are ignored, or refused by a reader that
    writes the ``whole`` object back."""
    try:
        desired = msgspec.json.decode(raw, type=DesiredState)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Refused(f"desired state: {error}", code="bad_desired") from None
    if desired.schema != SCHEMA:
        raise Refused(f"desired state: schema {desired.schema}, this agent reads {SCHEMA}", code="bad_desired")
    if whole and (lost := unknown_field(msgspec.json.decode(raw), msgspec.to_builtins(desired))):
        why = f"{lost} is not known to this version and would be lost; upgrade mlxrack on this machine"
        raise Refused(f"desired state: {why}", code="newer_schema")
    for node, assignments in desired.nodes.items():
        _check(node, assignments)
    _check_peers(desired.peers)
    return desired


def encode(desired: DesiredState) -> bytes:
    """The object as stored."""
    return msgspec.json.format(msgspec.json.encode(desired), indent=1)


def unknown_field(given: object, understood: object, path: str = "") -> str:
    """The first field of a tree that is missing from what was understood of it; "" if none is."""
    pairs: list[tuple[object, object, str]] = []
    if isinstance(given, dict) and isinstance(understood, dict):
        for name, value in given.items():
            if name not in understood:
                return f"{path}{name}"
            pairs.append((value, understood[name], f"{path}{name}."))
    elif isinstance(given, list) and isinstance(understood, list | tuple):
        pairs = [(a, b, f"{path[:-1]}[{n}].") for n, (a, b) in enumerate(zip(given, understood, strict=True))]
    return next((found for one in pairs if (found := unknown_field(*one))), "")


def _check(node: str, assignments: tuple[Assignment, ...]) -> None:
    names = [one.model for one in assignments]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"desired state: node {node} is assigned {name} twice", code="bad_desired")
    for one in assignments:
        try:
            for what in ("model", "source", "version"):
                check_name(getattr(one, what), what)
        except Refused as error:
            raise Refused(f"desired state: node {node}: {error.message}", code="bad_desired") from None


def _check_peers(peers: tuple[DesiredPeer, ...]) -> None:
    for what, values in (("id", [p.id for p in peers]), ("url", [p.url.rstrip("/") for p in peers])):
        for value in values:
            if values.count(value) > 1:
                raise Refused(f"desired state: two peers share the {what} {value}", code="bad_desired")
    for peer in peers:
        try:
            check_name(peer.id, "id")
        except Refused as error:
            raise Refused(f"desired state: peers: {error.message}", code="bad_desired") from None
        if not peer.url.startswith(("http://", "https://")):
            raise Refused(f"desired state: peer {peer.id}: url: expected an http(s) URL", code="bad_desired")
