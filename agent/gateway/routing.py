"""Where a request is answered: here, on a peer, or nowhere, and why. Pure; dispatch does what this decides."""

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from agent.gateway.circuit_breaker import State
from agent.process.prefixes import BLOCK_TOK, Chain, matched
from agent.views import ModelView, NodeView, Sent


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What routing may look at. ``tried`` nodes failed this request already. With
    ``version`` an answer has to be gone on with, by exactly that version.

    ``chain`` are the hashes of the prompt's beginnings, ``prompt_tok`` its length, ``answer_tok`` the most that is
    asked for. ``over_tok`` is a context that was found too small for it. ``breakers`` are of this model, those that
    are not closed; ``sent`` is what each node got since its last beat. ``labels`` are the request's, for rules to
    come. ``dice`` in [0, 1) decides between equals.
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
    labels: Mapping[str, str] = {}
    dice: float = 0.0


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


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could answer, and what that would take, in seconds: until it can begin, for the part of the prompt
    that it does not know, for the answer, what that part of the prompt takes from others, and what speaks against it
    otherwise. ``measured`` tells its own speed from a guess."""

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

    @property
    def first_token_s(self) -> float:
        """When the first token is expected."""
        return self.wait_s + self.prefill_s


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Where, and between what. ``excluded`` says of each other node why it was no candidate."""

    place: Local | Forward | Refuse
    candidates: tuple[Candidate, ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was taken."""
        place = self.place
        if isinstance(place, Refuse):
            return None
        return next(one for one in self.candidates if one.node == place.node)


DEFAULT_PREFILL_TPS = 1_000.0
DEFAULT_GAP_S = 0.03
UNKNOWN_TOK = 1 << 30
OTHERS = 2.0
"""A prompt that is computed keeps those behind it and beside it waiting, too: so much more than it takes itself.
Found with scripts/simulate_routing.py: without it conversations leave their prompt caches for every passing
difference in load."""
HEAT_S = (0.0, 0.05, 0.5, 2.0, 5.0)
"""By thermal level: a node that is hot should cool down while others can answer."""
MEMORY_S: Mapping[str, float] = {"calm": 0.0, "soft": 0.5, "hard": 2.0}
KV_S = 0.15
"""Times k/(1-k) for a room for keys and values that is full by k."""
NEAR_S = 0.005
"""Candidates within this of the best count as equals."""


def choose(request: RouteRequest, here: NodeView, peers: Sequence[NodeView]) -> Decision:
    """Decide for one request.

    1. Candidates are nodes that are not down or lost, not draining, not tried before and have the model ready.
    2. Each costs the seconds in which it would be done: the prompts that are before it and its own, less what the
       prompt cache knows of it, at the measured speed; a row, if none is free; the answer, at the measured gap and
       as many rows as there would be; what the prompt takes from others; and barriers of heat, memory and distance.
    3. The cheapest wins. Among equals this node, else one by dice, so that many doors do not all choose the same.
    4. A suspect, one whose breaker is open, whose loader starts again or whose context seems too small comes after all
       others; one whose breaker has a request on trial, or whose context was found too small, is no candidate at all.
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
    best = _pick(weighed, here.node, request.dice)
    url = next(node.url for node, _ in fit if node.node == best.node)
    place = Local(node=best.node) if best.node == here.node else Forward(node=best.node, url=url)
    return Decision(place=place, candidates=weighed, excluded=tuple(excluded))


def _fit(request: RouteRequest, node: NodeView) -> ModelView | str:
    """The model as the node offers it, or why it cannot answer."""
    if node.state in ("down", "lost", "unknown"):
        return node.state
    if node.node in request.tried:
        return "tried"
    if node.draining:
        return "draining"
    for model in node.models:
        if model.name == request.model:
            if request.version and request.version not in model.versions:
                return "another version"
            if not request.version and not model.ready:
                return "coming" if model.coming else "not loaded"
            break
    else:
        return "does not serve it"
    if request.breakers and request.breakers.get(node.node) == "probing":
        return "breaker: on trial"
    if request.over_tok and model.context_tok <= request.over_tok:
        return "context too small"
    return model


def _weigh(request: RouteRequest, node: NodeView, model: ModelView, usual: tuple[float, float, int]) -> Candidate:
    prefill_tps = model.prefill_tps or usual[0]
    gap_s = model.gap_us / 1e6 if model.gap_us else usual[1]
    # how long answers are is the traffic's nature and no node's
    answer_tok = min(request.answer_tok, usual[2])
    sent, sent_tok = request.sent.get(node.node, (0, 0))
    requests = max(0, model.in_flight + sent)
    known_tok = BLOCK_TOK * matched(request.chain, node.known.get(model.name, ())) if request.chain else 0
    saved_tok = min(known_tok, max(0, request.prompt_tok - 1))
    step_s = gap_s * (1.0 + min(requests + 1, model.rows) / model.rows)
    answer_s = answer_tok * step_s
    # a row comes free every so often when all are taken, by answers as long as others' are
    usual_tok = usual[2] if usual[2] < UNKNOWN_TOK else answer_tok
    for_row_s = max(0, requests + 1 - model.rows) * usual_tok * step_s / model.rows
    wait_s = max(0, model.prefill_tok + sent_tok) / prefill_tps + for_row_s
    prefill_s = (request.prompt_tok - saved_tok) / prefill_tps
    barrier_s = _barrier_s(node, model)
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
        measured=model.prefill_tps is not None and model.answer_tok is not None,
    )


def _barrier_s(node: NodeView, model: ModelView) -> float:
    full = min(0.99, model.kv_ppm / 1e6)
    heat_s = HEAT_S[min(node.heat, len(HEAT_S) - 1)]
    return node.hop_s + heat_s + MEMORY_S.get(node.memory, 0.0) + KV_S * full / (1.0 - full)


def _last_resort(request: RouteRequest, node: NodeView, model: ModelView) -> str:
    """Why a node that could answer is taken only when no other can; "" when nothing is wrong with it."""
    if node.state == "suspect":
        return "suspect"
    if request.breakers and request.breakers.get(node.node) == "open":
        return "breaker: open"
    if request.version and not model.ready:
        return "coming back"
    # the door only guesses how long a prompt is; the node itself will say
    return "context too small" if 0 < model.context_tok < request.prompt_tok else ""


def _usual(models: Sequence[ModelView]) -> tuple[float, float, int]:
    """Speeds for a node that has not been measured: those of the others, else a guess that is the same for all."""
    speeds = [m.prefill_tps for m in models if m.prefill_tps]
    gaps = [m.gap_us for m in models if m.gap_us]
    answers = [m.answer_tok for m in models if m.answer_tok]
    return (
        median(speeds) if speeds else DEFAULT_PREFILL_TPS,
        median(gaps) / 1e6 if gaps else DEFAULT_GAP_S,
        int(median(answers)) or 1 if answers else UNKNOWN_TOK,
    )


def _pick(weighed: Sequence[Candidate], here: str, dice: float) -> Candidate:
    # a suspect, or a node whose breaker is open, is used only when no other can answer, however long that takes
    sound = [one for one in weighed if not one.last_resort] or weighed
    least = min(one.cost_s for one in sound)
    near = [one for one in sound if one.cost_s <= least + NEAR_S]
    local = next((one for one in near if one.node == here), None)
    if local is not None:
        return local
    near.sort(key=lambda one: one.node)
    return near[int(dice * len(near))]


def _refuse(request: RouteRequest, here: NodeView, nodes: Sequence[NodeView], peers: Sequence[NodeView]) -> Refuse:
    known = sorted({m.name for node in (here, *peers) for m in node.models})
    if request.model not in known and all(node.heard for node in peers):
        return Refuse(code="model_not_found", known=tuple(known))
    unheard = any(node.state == "unknown" for node in peers)
    # one that was lost, tried or is on trial may be had again in a moment
    living = [node for node in nodes if node.state != "down" and not node.draining]
    offered = [m for node in living for m in node.models if m.name == request.model]
    loading = unheard or any(m.coming or m.ready for m in offered)
    return Refuse(code="no_capacity", loading=loading, known=tuple(known))
