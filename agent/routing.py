"""Where a request is answered: here, on a peer, or nowhere. Pure; dispatch does what this decides."""

import msgspec


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A served name as a node offers it. ``in_flight`` counts requests that are running or waiting there.

    ``coming`` says that it is not ready yet and soon will be. ``versions`` are those that can go on with an answer that
    they began, whether they take new requests or not.
    """

    name: str
    version: str
    ready: bool
    coming: bool = False
    in_flight: int = 0
    versions: tuple[str, ...] = ()


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as this one knows it; ``url`` is "" for this node itself.

    ``state`` is up, suspect, down, or unknown for a peer that has not been heard since a start a moment ago.
    """

    node: str
    url: str = ""
    state: str = "up"
    draining: bool = False
    models: tuple[ModelView, ...] = ()


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What routing may look at. ``tried`` nodes failed this request already; ``hop`` forbids another one. With
    ``version`` an answer has to be gone on with, by exactly that version."""

    model: str
    tried: frozenset[str] = frozenset()
    hop: bool = False
    version: str = ""
    task_class: str = ""


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """Answer on this node."""

    node: str


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """Answer on a peer."""

    node: str
    url: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """No node can answer. ``code`` is model_not_found or no_capacity; ``loading`` says that waiting may help."""

    code: str
    loading: bool = False
    known: tuple[str, ...] = ()


HOP_COST = 1
"""A forwarded request pays a network hop; measured in requests in flight."""
SUSPECT_COST = 1_000
"""A node that missed a beat is used only when no other can answer."""


def choose(request: RouteRequest, here: NodeView, peers: tuple[NodeView, ...]) -> Local | Forward | Refuse:
    """Decide for one request.

    1. Candidates are nodes that are not down, not draining, not tried before and have the model ready.
    2. The least loaded wins; a hop costs one request in flight; suspects come last; ties go by node id.
    3. Without a candidate: unknown everywhere is model_not_found, else no_capacity.
    """
    nodes = (here,) if request.hop else (here, *peers)
    candidates = [
        (_cost(node, model, here), node.node, node)
        for node in nodes
        if node.state != "down" and not node.draining and node.node not in request.tried
        for model in node.models
        if model.name == request.model and _serves(model, request.version)
    ]
    if candidates:
        _, _, best = min(candidates, key=lambda c: (c[0], c[1]))
        return Local(node=best.node) if best is here else Forward(node=best.node, url=best.url)
    known = sorted({m.name for node in (here, *peers) for m in node.models})
    unheard = any(node.state == "unknown" for node in peers)
    if request.model not in known and not unheard:
        return Refuse(code="model_not_found", known=tuple(known))
    living = [node for node in nodes if node.state != "down"]
    loading = unheard or any(m.name == request.model and m.coming for node in living for m in node.models)
    return Refuse(code="no_capacity", loading=loading, known=tuple(known))


def _serves(model: ModelView, version: str) -> bool:
    return version in model.versions if version else model.ready


def _cost(node: NodeView, model: ModelView, here: NodeView) -> int:
    hop = 0 if node is here else HOP_COST
    return model.in_flight + hop + (SUSPECT_COST if node.state == "suspect" else 0)
