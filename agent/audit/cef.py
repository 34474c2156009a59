"""Entries in ArcSight's Common Event Format (CEF), version 0, for a SIEM. Pure; docs/audit.md lists the mapping."""

from collections.abc import Iterator

from agent.audit.entry import Entry

_SEVERITY = {"ok": 1, "cancelled": 2, "refused": 5, "failed": 6}


def line(entry: Entry, version: str) -> str:
    """One entry as a CEF line, without the line break."""
    decision = entry.code or entry.decision or "none"
    name = f"request {entry.outcome or 'decided'}"
    severity = 8 if entry.code == "audit_unavailable" else _SEVERITY.get(entry.outcome, 3)
    head = ("CEF:0", "mlxrack", "agent", version, f"{entry.kind}:{decision}", name, str(severity))
    extension = " ".join(f"{key}={_value(value)}" for key, value in _extension(entry) if value not in ("", None))
    return f"{'|'.join([head[0], *map(_header, head[1:])])}|{extension}"


def _extension(entry: Entry) -> Iterator[tuple[str, object]]:
    facts, answered = entry.facts, entry.answered
    yield from (("rt", entry.t_ms), ("externalId", entry.request), ("dvchost", entry.node), ("act", entry.decision))
    yield from (("outcome", entry.outcome), ("reason", entry.code or entry.reason))
    if facts is not None:
        yield from (("suser", facts.key_id), ("cs1Label", "taskClass"), ("cs1", facts.task_class))
        yield from _labelled("cs2", "model", facts.model)
    yield from _labelled("cs3", "sensitive", ",".join(facts.sensitive) or "policy" if entry.sensitive and facts else "")
    yield from _labelled("cs4", "policy", "/".join(filter(None, (entry.policy, entry.policy_digest))))
    if answered is not None:
        yield from _labelled("cs5", "place", answered.category)
        yield from (("dhost", answered.node or answered.provider), ("destinationServiceName", answered.model))
    yield from _labelled("cs6", "fallback", entry.fallback)
    yield from _labelled("cn1", "promptTokens", entry.prompt_tok or None)
    yield from _labelled("cn2", "completionTokens", entry.completion_tok or None)
    yield from _labelled("cn3", "redactions", sum(entry.redacted.values()) or None)
    yield from _labelled("cfp1", "cost", entry.cost_micro / 1e6 if entry.cost_micro else None)
    if entry.total_us is not None:
        yield "start", entry.t_ms - entry.total_us // 1000
        yield "end", entry.t_ms


def _labelled(key: str, label: str, value: object) -> Iterator[tuple[str, object]]:
    if value not in ("", None):
        yield f"{key}Label", label
        yield key, value


def _header(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _value(value: object) -> str:
    text = str(value).replace("\\", "\\\\").replace("=", "\\=")
    return text.replace("\r", "\\r").replace("\n", "\\n")
