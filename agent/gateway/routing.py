"""Routing: where a request is served (here, on a peer, or nowhere), and why. Pure; dispatch carries it out."""

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from agent.gateway.circuit_breaker import State
from agent.process.prefixes import BLOCK_TOK, Chain, matched
from agent.views import ModelView, NodeView, Sent


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The input of a routing decision. ``tried`` nodes failed this request already. With
    ``version``, an answer is to be continued, by exactly that version.

    ``chain`` are the hashes of the prompt's prefixes, ``prompt_tok`` its length, ``answer_tok`` the most tokens
    requested. ``over_tok`` is a context length that was found too small for it. ``breakers`` are this model's circuit
    breakers that are not closed; ``sent`` is what each node was sent since its last heartbeat. ``draw`` in [0, 1)
    breaks ties at random.
    """

    model: str
    tried: frozenset[str] = frozenset()
    version: str = ""
    chain: Chain = ()
    prompt_tok: int = 0
    answer_tok: int = 256
    over_tok: int = 0
    breakers: Mapping[str, State] = {}
    sent: Mapping[str, Sent] = {}
    draw: float = 0.0


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """Serve on this node."""

    node: str


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """Forward to a peer."""

    node: str
    url: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """No node can serve it. ``code`` is model_not_found or no_capacity; ``loading`` says that waiting may help."""

    code: str
    loading: bool = False
    known: tuple[str, ...] = ()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could serve the request, and its estimated cost in seconds: until it can start, for the uncached part
    of the prompt, for the answer, for the delay that this prefill causes to other requests, and further penalties.
    ``measured`` tells measured speeds from defaults; ``step_s`` is the expected time between two tokens."""

    node: str
    cost_s: float
    wait_s: float
    prefill_s: float
    answer_s: float
    others_s: float
    barrier_s: float
    saved_tok: int = 0
    context_tok: int = 0
    last_resort: str = ""
    measured: bool = False
    step_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        """Expected time to first token."""
        return self.wait_s + self.prefill_s


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The place chosen, and the candidates. ``excluded`` gives the reason for each node that was not one."""

    place: Local | Forward | Refuse
    candidates: tuple[Candidate, ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was chosen."""
        place = self.place
        if isinstance(place, Refuse):
            return None
        return next(one for one in self.candidates if one.node == place.node)


DEFAULT_PREFILL_TPS = 1_000.0
DEFAULT_GAP_S = 0.03
UNKNOWN_TOK = 1 << 30
OTHERS = 2.0
"""Prefill also delays the requests queued behind it and decoding beside it: this multiple of its own time is added.
Found with scripts/simulate_routing.py: without it conversations leave their prompt caches for every passing
difference in load."""
HEAT_S = (0.0, 0.05, 0.5, 2.0, 5.0)
"""Penalty by thermal level: a hot node should cool down while others can serve."""
MEMORY_S: Mapping[str, float] = {"calm": 0.0, "soft": 0.5, "hard": 2.0}
CAPPED_S = 30.0
"""A node whose context holds the prompt, but would cap the answer's tokens."""
KV_S = 0.15
"""Penalty, times k/(1-k), for a KV cache of which the share k is used."""
NEAR_S = 0.005
"""Candidates within this of the best count as tied."""


def choose(request: RouteRequest, here: NodeView, peers: Sequence[NodeView]) -> Decision:
    """Decide for one request.

    1. Candidates are nodes that are not down or lost, not draining, not tried before and have the model ready.
    2. The cost of each is the time to completion: queued prompts and its own, less its prompt cache hit, at the
       measured prefill speed; the wait for a row, if none is free; the answer, at the measured ITL with as many rows
       as there would be; the delay of other requests; and penalties for heat, memory pressure and distance.
    3. The cheapest wins. Ties go to this node, else to a random draw, so that many gateways do not all choose the same.
    4. A suspect, one whose breaker is open, whose loader is restarting or whose context seems too small is a last
       resort; one whose breaker is probing, or whose context was found too small, is excluded.
    5. Without a candidate: unknown everywhere is model_not_found, else no_capacity.
    """
    nodes = (here, *peers)
    fit: list[tuple[NodeView, ModelView]] = []
    excluded: list[tuple[str, str]] = []
    for node in nodes:
        found = _fit(request, node)
        if isinstance(found, str):
            excluded.append((node.node, found))
        else:
            fit.append((node, found))
    if not fit:
        return Decision(place=_refuse(request, here, nodes, peers), excluded=tuple(excluded))
    usual = _usual([model for _, model in fit])
    weighed = tuple(_weigh(request, node, model, usual) for node, model in fit)
    best = _pick(weighed, here.node, request.draw)
    url = next(node.url for node, _ in fit if node.node == best.node)
    place = Local(node=best.node) if best.node == here.node else Forward(node=best.node, url=url)
    return Decision(place=place, candidates=weighed, excluded=tuple(excluded))


def _fit(request: RouteRequest, node: NodeView) -> ModelView | str:
    """The model as the node offers it, or why the node is excluded."""
    if node.state in ("down", "lost", "unknown"):
        return node.state
    if node.node in request.tried:
        return "tried"
    if node.draining:
        return "draining"
    for model in node.models:
        if model.name == request.model:
            if request.version and request.version not in model.versions:
                return "different version"
            if not request.version and not model.ready:
                return "loading" if model.coming else "not loaded"
            break
    else:
        return "model not served"
    if request.breakers and request.breakers.get(node.node) == "probing":
        return "circuit breaker: probing"
    return "context too small" if request.over_tok and model.context_tok <= request.over_tok else model


def _weigh(request: RouteRequest, node: NodeView, model: ModelView, usual: tuple[float, float, int]) -> Candidate:
    prefill_tps = model.prefill_tps or usual[0]
    gap_s = model.gap_us / 1e6 if model.gap_us else usual[1]
    # the length of answers depends on the traffic, not on the node
    answer_tok = min(request.answer_tok, usual[2])
    sent, sent_tok = request.sent.get(node.node, (0, 0))
    requests = max(0, model.in_flight + sent)
    known_tok = BLOCK_TOK * matched(request.chain, node.known.get(model.name, ())) if request.chain else 0
    saved_tok = min(known_tok, max(0, request.prompt_tok - 1))
    crowd = 1.0 if model.crowd is None else model.crowd
    step_s = gap_s * (1.0 + crowd * min(requests + 1, model.rows) / model.rows)
    answer_s = answer_tok * step_s
    # with all rows taken, one frees up as often as answers of usual length end
    usual_tok = usual[2] if usual[2] < UNKNOWN_TOK else answer_tok
    for_row_s = max(0, requests + 1 - model.rows) * usual_tok * step_s / model.rows
    wait_s = max(0, model.prefill_tok + sent_tok) / prefill_tps + for_row_s
    prefill_s = (request.prompt_tok - saved_tok) / prefill_tps
    barrier_s = _barrier_s(node, model, request)
    resort = _last_resort(request, node, model)
    others_s = OTHERS * prefill_s
    cost_s = wait_s + prefill_s + answer_s + others_s + barrier_s
    return Candidate(
        node=node.node,
        cost_s=cost_s,
        wait_s=wait_s,
        prefill_s=prefill_s,
        answer_s=answer_s,
        others_s=others_s,
        barrier_s=barrier_s,
        saved_tok=saved_tok,
        context_tok=model.context_tok,
        last_resort=resort,
        # the length of answers matters to the first token only where all rows are taken
        measured=model.prefill_tps is not None and (model.answer_tok is not None or not for_row_s),
        step_s=step_s if model.gap_us else 0.0,
    )


def _barrier_s(node: NodeView, model: ModelView, request: RouteRequest) -> float:
    full = min(0.99, model.kv_ppm / 1e6)
    heat_s = HEAT_S[min(node.heat, len(HEAT_S) - 1)]
    capped_s = CAPPED_S if 0 < model.context_tok < request.prompt_tok + request.answer_tok else 0.0
    return capped_s + node.hop_s + heat_s + MEMORY_S.get(node.memory, 0.0) + KV_S * full / (1.0 - full)


def _last_resort(request: RouteRequest, node: NodeView, model: ModelView) -> str:
    """Why a node that could serve is chosen only when no other can; "" when nothing is wrong with it."""
    if node.state == "suspect":
        return "suspect"
    if request.breakers and request.breakers.get(node.node) == "open":
        return "circuit breaker: open"
    if request.version and not model.ready:
        return "loader restarting"
    # the gateway only estimates the length of a prompt; the worker knows it
    return "context too small" if 0 < model.context_tok < request.prompt_tok else ""


def _usual(models: Sequence[ModelView]) -> tuple[float, float, int]:
    """Speeds for a node that has not been measured: the others' median, else a default that is the same for all."""
    speeds = [m.prefill_tps for m in models if m.prefill_tps]
    gaps = [m.gap_us for m in models if m.gap_us]
    answers = [m.answer_tok for m in models if m.answer_tok]
    return (
        median(speeds) if speeds else DEFAULT_PREFILL_TPS,
        median(gaps) / 1e6 if gaps else DEFAULT_GAP_S,
        int(median(answers)) or 1 if answers else UNKNOWN_TOK,
    )


def _pick(weighed: Sequence[Candidate], here: str, draw: float) -> Candidate:
    # a last resort is used only when no other node can serve, however long that takes
    sound = [one for one in weighed if not one.last_resort] or weighed
    least = min(one.cost_s for one in sound)
    near = [one for one in sound if one.cost_s <= least + NEAR_S]
    if (local := next((one for one in near if one.node == here), None)) is not None:
        return local
    near.sort(key=lambda one: one.node)
    return near[int(draw * len(near))]


def _askable(here: NodeView, peers: Sequence[NodeView]) -> tuple[str, ...]:
    """Names that can be asked for: this node's, which it loads on demand, and what peers have ready or soon."""
    offered = {m.name for peer in peers if peer.state != "down" for m in peer.models if m.ready or m.coming}
    return tuple(sorted(offered | {m.name for m in here.models}))


def _refuse(request: RouteRequest, here: NodeView, nodes: Sequence[NodeView], peers: Sequence[NodeView]) -> Refuse:
    known = sorted({m.name for node in (here, *peers) for m in node.models})
    if request.model not in known and all(node.heard for node in peers):
        return Refuse(code="model_not_found", known=_askable(here, peers))
    unheard = any(node.state == "unknown" for node in peers)
    # one that was lost, tried or is probing may be available again in a moment
    living = [node for node in nodes if node.state != "down" and not node.draining]
    offered = [m for node in living for m in node.models if m.name == request.model]
    return Refuse(code="no_capacity", loading=unheard or any(m.coming or m.ready for m in offered), known=tuple(known))
