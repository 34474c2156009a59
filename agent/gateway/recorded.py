"""What the audit records of a request on its way through the wall. Pure."""

from decimal import Decimal
from typing import Any, cast

from agent.audit.entry import Answered, Entry, allowed
from agent.gateway.call import Call
from agent.gateway.outcomes import Ended, ended
from agent.gateway.passage import Passage
from agent.policy.deciding import Allow, Refuse
from agent.policy.rules import Kind, digest
from shared.errors import Refused

_MICRO = 1_000_000


def decided_entry(passage: Passage, node: str, t_ms: int) -> Entry:
    """Before the work on a request that is SENSITIVE, or leaves the premises."""
    return Entry(kind="decided", t_ms=t_ms, request=passage.request_id, node=node, **_decided(passage))


def ended_entry(passage: Passage, node: str, t_ms: int, now_s: float, status: int) -> Entry:
    """At the end of every request; ``status`` is that of its response, 0 where none was sent."""
    calls: list[Call] = passage.calls
    first = calls[0] if calls else None
    end = _end(passage, first)
    return Entry(
        kind="ended",
        t_ms=t_ms,
        request=passage.request_id,
        node=node,
        **_decided(passage),
        answered=_answered(passage, first),
        fallback=passage.left if passage.at is not None else "",
        redacted=cast("dict[Kind, int]", dict(passage.redacted)),
        outcome=end.outcome,
        reason=end.reason,
        prompt_tok=sum(call.prompt_tok for call in calls if call.turn == 0),
        cached_tok=sum(call.cached_tok for call in calls if call.turn == 0),
        completion_tok=sum(call.completion_tok for call in calls),
        reasoning_tok=sum(call.done.reasoning_tok for call in calls if call.done),
        cost_micro=0 if passage.usd is None else int((passage.usd * _MICRO).to_integral_value()),
        currency="" if passage.usd is None else "USD",
        queue_us=first.done.queue_us if first is not None and first.done is not None else None,
        ttft_us=None if first is None or first.first_s is None else int((first.first_s - first.began_s) * 1e6),
        total_us=int((now_s - passage.began_s) * 1e6),
        status=status,
        streamed=passage.stream,
    )


def _decided(passage: Passage) -> dict[str, Any]:
    decision = passage.decision
    is_refused = isinstance(decision, Refuse)
    return {
        "facts": passage.facts,
        "sensitive": passage.private,
        "policy": passage.rules.version,
        "policy_digest": digest(passage.rules),
        "decision": "refuse" if is_refused else "allow" if isinstance(decision, Allow) else "redact",
        "code": passage.code or (passage.calls[0].code if passage.calls else ""),
        "places": () if is_refused else allowed(passage.places),
    }


def _answered(passage: Passage, first: Call | None) -> Answered | None:
    if (place := passage.at) is not None:
        return Answered(category=place.category, provider=place.provider, model=place.model)
    if first is None or not first.worker:
        return None
    return Answered(category="rack", node=first.worker, model=first.model, version=first.version)


def _end(passage: Passage, first: Call | None) -> Ended:
    if first is not None and first.end is not None:
        return first.end
    return ended(Refused("", code=passage.code)) if passage.code else Ended("cancelled")


def spent(amount: Decimal | None, more: Decimal | None) -> Decimal | None:
    """What a request has cost by now; None while that is not known."""
    return amount if more is None else more if amount is None else amount + more
