"""What rooms tell each other of nodes and models: plain facts, no behaviour."""

from collections.abc import Container, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

Sent = tuple[int, int]
"""Requests, and tokens of their prompts, that a node got since it last said what it has, less what has ended."""


Count = Annotated[int, Meta(ge=0)]


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A served name as a node offers it. ``in_flight`` counts requests that are running or waiting there.

    ``coming`` says that it is not ready yet and soon will be. ``versions`` are those that can go on with an answer
    that they began, whether they take new requests or not. ``rows`` requests are decoded together; ``prefill_tok``
    prompt tokens are still to be computed. ``prefill_tps`` (tokens a second), ``gap_us`` (between two tokens of an
    answer that is alone) and ``answer_tok`` (tokens of an answer) were measured there lately, None where nothing was.
    ``context_tok`` is how long prompt and answer may be, 0 where that is not known. ``kv_ppm`` is how full the room
    for keys and values is. ``prefixes`` are hashes of what its prompt cache is likely to hold. What no node can mean
    is refused where a beat is read: one nonsensical number would speak for every request at every door.
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
    kv_ppm: Count = 0
    prefixes: bytes = b""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as this one knows it; ``url`` is "" for this node itself.

    ``state`` is up, suspect (a beat was missed), lost (a request could not reach it; nothing is sent before its next
    beat), down, or unknown for a peer that has not been heard since a start a moment ago. What a peer serves that was
    not ``heard`` since this node's start nobody knows. ``heat`` is the system's
    thermal level, 0 for none; ``memory`` the guard's word; ``hop_s`` what a way there and back takes.
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


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """A model of this node. ``version`` is "" when it is not in memory; ``offers`` is the version that would come when
    somebody asks; ``changing`` that it is being loaded, swapped or unloaded right now."""

    model: str
    names: tuple[str, ...]
    version: str = ""
    offers: str = ""
    pinned: bool = False
    changing: bool = False
