"""Why requests were routed as they were: the decisions for each of the last requests, for display. Pure; never any
prompt text, only ids, names, counts and times.
"""

from collections import OrderedDict
from typing import Any

import msgspec

from agent.gateway.routing import Candidate, Decision, Refuse

KEPT = 4096
"""Requests whose decisions are kept."""
_MOST_STEPS = 64
_MOST_CANDIDATES = 12
"""In a large rack, the chosen node, the cheapest ones and the first of the excluded ones are kept."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a request, ``at_s`` on the node's monotonic clock; ``decision`` where one was made."""

    at_s: float
    what: str
    node: str = ""
    why: str = ""
    decision: Decision | None = None


class Trail(msgspec.Struct, kw_only=True):
    """One part of one request, from its arrival at the gateway to its end."""

    request_id: str
    t_ms: int
    began_s: float
    model: str
    key_id: str = ""
    prompt_tok: int = 0
    steps: list[Step] = []
    outcome: str = ""
    worker: str = ""

    def add(self, at_s: float, what: str, node: str = "", why: str = "", decision: Decision | None = None) -> None:
        """Record a step; of a request that keeps retrying, the first steps are kept."""
        if len(self.steps) < _MOST_STEPS:
            if decision is not None and len(decision.candidates) + len(decision.excluded) > _MOST_CANDIDATES:
                decision = _shortened(decision)
            self.steps.append(Step(at_s=at_s, what=what, node=node, why=why, decision=decision))


def _in_order(one: Candidate) -> tuple[bool, float]:
    return (bool(one.last_resort), one.cost_s)


def _shortened(decision: Decision) -> Decision:
    chosen = decision.chosen
    best = sorted(decision.candidates, key=lambda one: (one is not chosen, *_in_order(one)))[:_MOST_CANDIDATES]
    return msgspec.structs.replace(
        decision, candidates=tuple(best), excluded=decision.excluded[: _MOST_CANDIDATES - len(best)]
    )


class Decisions:
    """The most recent trails by request id."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._trails: OrderedDict[str, Trail] = OrderedDict()

    def keep(self, trail: Trail) -> Trail:
        """Start keeping a trail."""
        self._trails[trail.request_id] = trail
        while len(self._trails) > self._kept:
            self._trails.popitem(last=False)
        return trail

    def find(self, request_id: str) -> list[Trail]:
        """All parts of a request that are still kept."""
        found = []
        part, number = self._trails.get(request_id), 1
        while part is not None:
            found.append(part)
            part, number = self._trails.get(f"{request_id}-{number}"), number + 1
        return found

    def last(self, count: int) -> list[Trail]:
        """The most recent trails, newest first."""
        return [self._trails[one] for one in list(reversed(self._trails))[:count]]


def shown(trail: Trail) -> dict[str, Any]:
    """A trail for display and for programs."""
    return {
        "request": trail.request_id,
        "t_ms": trail.t_ms,
        "model": trail.model,
        "key": trail.key_id,
        "prompt_tok_guess": trail.prompt_tok,
        "outcome": trail.outcome or "running",
        "worker": trail.worker,
        "steps": [_step(one, trail.began_s) for one in trail.steps],
    }


def _step(step: Step, began_s: float) -> dict[str, Any]:
    base: dict[str, Any] = {"at_ms": round((step.at_s - began_s) * 1000, 1), "what": step.what}
    if step.node:
        base["node"] = step.node
    if step.why:
        base["why"] = step.why
    if (decision := step.decision) is None:
        return base
    if isinstance(decision.place, Refuse):
        base["why"] = decision.place.code
    base["candidates"] = [_candidate(one) for one in sorted(decision.candidates, key=_in_order)]
    base["excluded"] = dict(decision.excluded)
    return base


def _candidate(one: Candidate) -> dict[str, Any]:
    shown = {
        "node": one.node,
        "cost_s": round(one.cost_s, 4),
        "wait_s": round(one.wait_s, 4),
        "prefill_s": round(one.prefill_s, 4),
        "answer_s": round(one.answer_s, 4),
        "others_s": round(one.others_s, 4),
        "barrier_s": round(one.barrier_s, 4),
        "saved_tok": one.saved_tok,
    }
    return {**shown, "last_resort": one.last_resort} if one.last_resort else shown
