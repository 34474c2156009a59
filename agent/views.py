"""What packages exchange about nodes and models: plain data, no behaviour."""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

Sent = tuple[int, int]
"""Requests, and tokens of their prompts, sent to a node since its last report, less those that ended."""


Count = Annotated[int, Meta(ge=0)]


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A served name as a node offers it. ``in_flight`` counts requests that are running or queued there.

    ``coming`` says that it is not ready yet and soon will be. ``versions`` are those that can continue an answer
    that they began, whether they accept new requests or not. ``rows`` requests are decoded together; ``prefill_tok``
    prompt tokens are still to be computed. ``prefill_tps`` (tokens per second), ``gap_us`` (ITL of an answer that
    runs alone) and ``answer_tok`` (tokens of an answer) were measured there recently, None where nothing was; the
    first two are then what its calibration found, if it has one, and ``crowd`` how a step grows with the share of rows
    in use.
    ``context_tok`` is the context length, prompt and answer together, 0 if unknown. ``kv_ppm`` is how full the KV
    cache is. ``prefixes`` are hashes of the prefixes that its prompt cache is likely to hold. Impossible values are
    rejected when a heartbeat is decoded: a single one would distort routing of every request at every gateway.
    """

    name: str
    version: str
    ready: bool
    coming: bool = False
    in_flight: Count = 0
    versions: tuple[str, ...] = ()
    rows: Annotated[int, Meta(ge=1)] = 8
    context_tok: Count = 0
    prefill_tok: Count = 0
    prefill_tps: Annotated[float, Meta(gt=0, le=1e12)] | None = None
    gap_us: Count | None = None
    answer_tok: Count | None = None
    crowd: Annotated[float, Meta(ge=0, le=1e3)] | None = None
    kv_ppm: Count = 0
    prefixes: bytes = b""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as this one knows it; ``url`` is "" for this node itself.

    ``state`` is up, suspect (a heartbeat was missed), lost (a request could not reach it; nothing is sent before its
    next heartbeat), down, or unknown for a peer that has not answered since this node's start a moment ago. What a
    peer serves is unknown until it was ``heard`` since this node's start. ``heat`` is the system's
    thermal level, 0 for none; ``memory`` the memory guard's level; ``hop_s`` the round-trip time.
    """

    node: str
    url: str = ""
    state: str = "up"
    heard: bool = True
    draining: bool = False
    models: tuple[ModelView, ...] = ()
    heat: int = 0
    memory: str = "calm"
    hop_s: float = 0.0
    known: Mapping[str, Container[int]] = {}


def offers(
    nodes: Iterable[NodeView], model: str, *, but: str = "", up: bool = False, ready: bool = False
) -> Iterator[tuple[NodeView, ModelView]]:
    """Every node that could take a request for a model, and the model there: of those that are not down, but ``but``.
    With ``up`` only nodes that answer heartbeats, with ``ready`` only models that accept requests now."""
    for node in nodes:
        if node.node != but and node.state != "down" and (node.state == "up" or not up):
            yield from ((node, one) for one in node.models if one.name == model and (one.ready or not ready))


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """A model of this node. ``version`` is "" when it is not resident; ``offers`` is the version to load on demand;
    ``changing`` says that it is being loaded, swapped or unloaded right now."""

    model: str
    names: tuple[str, ...]
    version: str = ""
    offers: str = ""
    pinned: bool = False
    changing: bool = False
