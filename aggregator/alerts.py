"""Which alerts fire and which are resolved: state and facts in, new state and notices out. Pure.

An alert is identified by (code, subject): one notice when it fires, one when it is resolved. Sent notices are recorded
in the state, so that a stateless cron job never sends one twice.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from aggregator.calendar import DAY_MS
from aggregator.config import Alerts
from aggregator.heat import KNOWN_SHARE, percent_beside
from aggregator.incidents.causes import GRACE_MS
from aggregator.window import STRAIGHTEN_MS, Fact, Meta, shifted
from shared.records import (
    EXPIRY_DAYS,
    AgentStarted,
    AuditFailing,
    AuditRecovered,
    CertificateExpires,
    HostSample,
    ModelEvicted,
    NodeIdClash,
    PeerDown,
    PeerUp,
    SwapFinished,
)

SWAP_FAILED_FOR_S = 3600.0
CLASH_FOR_MS = 1_800_000
"""How long two agents under one id are alerted of after they were last seen; agents repeat it every ten minutes."""
AUDIT_FOR_MS = 1_800_000
"""The same of an audit log that fails."""
TURNS = 2
CERTIFICATES = ("listener", "node", "ca")
"""Those that a node has."""
TOLD = 64
"""Events of a node whose second copy is recognised."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of alert. ``channel`` is alerts or thermal, ``runbook`` a topic of `mlxrack-agent help`."""

    code: str
    title: str
    severity: str
    channel: str
    runbook: str


RULES = tuple(
    Rule(code=code, title=title, severity=severity, channel=channel, runbook=runbook)
    for code, title, severity, channel, runbook in (
        ("node_down", "Node down", "page", "alerts", "node-down"),
        ("throttling", "Thermal throttling", "warn", "thermal", "throttling"),
        ("swap_failed", "Model swap failed", "warn", "alerts", "swap-failed"),
        ("eviction_storm", "Eviction storm", "warn", "alerts", "eviction-storm"),
        ("node_id_clash", "Two agents use one node id", "page", "alerts", "node-id-clash"),
        ("audit_failing", "Audit log fails", "page", "alerts", "audit-log-fails"),
        ("certificate_expires", "Certificate expires", "warn", "alerts", "certificate-expires"),
        ("certificate_expires_soon", "Certificate expires soon", "page", "alerts", "certificate-expires"),
    )
)


class Firing(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that has been firing since ``since_ms``; ``text`` is the evidence."""

    code: str
    subject: str
    since_ms: int
    text: str


class Warm(msgspec.Struct, frozen=True, kw_only=True):
    """Heat of one window of a node. It is identified by its batch: a clock that runs ahead gives several of them the
    same end, and two windows may well have the same figures."""

    batch: tuple[int, int, int]
    ended_ms: int
    length_ms: int
    throttled_us: int
    known_us: int


class NodeMemory(msgspec.Struct, frozen=True, kw_only=True):
    """State of a node between runs of `alert`; times in ms, bounded lists. ``told`` identifies its newest events: each
    is read twice, at once and in order, and counts as the first copy says. ``evicted`` are times by what identifies an
    eviction. ``certificates`` are when a certificate was last reported, and when it ends. ``clash`` is when two agents
    were last seen under this id, and their marks. ``audit_failing`` is the last word of an audit log that fails: when,
    since when, why, and how many entries are lost; ``audit_well_ms`` is the last word of the contrary.
    ``incarnations`` is when each last reported, ``taken_turns`` when one did after another one had in between."""

    last_seen_ms: int = 0
    last_up_ms: int = 0
    down_since_ms: int | None = None
    reported_by: str = ""
    warm: tuple[Warm, ...] = ()
    told: tuple[str, ...] = ()
    evicted: dict[str, int] = {}
    swaps: dict[str, tuple[int, str, str]] = {}
    certificates: dict[str, tuple[int, int]] = {}
    clash: tuple[int, str] = (0, "")
    audit_failing: tuple[int, int, str, int] = (0, 0, "", 0)
    audit_well_ms: int = 0
    incarnations: dict[str, int] = {}
    taken_turns: tuple[int, ...] = ()


class AlertState(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state. ``cursors`` are the last objects read of each node."""

    cursors: dict[str, str] = {}
    nodes: dict[str, NodeMemory] = {}
    firing: tuple[Firing, ...] = ()


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """A notice to send: an alert that fired (``resolved`` false) or was resolved; ``at_ms`` is when."""

    rule: Rule
    firing: Firing
    resolved: bool
    at_ms: int = 0


def observe(state: AlertState, facts: Iterable[Fact], now_ms: int, config: Alerts) -> AlertState:
    """The state after some facts of straightened batches; idempotent for repeated facts. Times are capped at now: a
    clock that runs ahead must not hide later events."""
    nodes = dict(state.nodes)
    for fact in sorted(
        map(_on_the_stores_clock, facts), key=lambda f: (f.meta.t_end_ms, f.meta.node, f.meta.seq, f.ordinal)
    ):
        _observe(nodes, fact, now_ms, config)
    return msgspec.structs.replace(state, nodes=nodes)


def evaluate(state: AlertState, now_ms: int, config: Alerts) -> tuple[AlertState, tuple[Notice, ...]]:
    """The state with the alerts that fire at ``now_ms``, and the notices for what changed."""
    held = {_key(f): f for f in state.firing}
    now_firing = {_key(f): f for node in sorted(state.nodes) for f in _of_node(node, state, held, now_ms, config)}
    rules = {rule.code: rule for rule in RULES}
    notices = [
        Notice(rule=rules[k[0]], firing=f, resolved=False, at_ms=now_ms) for k, f in now_firing.items() if k not in held
    ]
    notices += [
        Notice(rule=rules[k[0]], firing=f, resolved=True, at_ms=_ended_ms(f, state, now_ms))
        for k, f in held.items()
        if k not in now_firing
    ]
    kept = tuple(held.get(k, f) for k, f in sorted(now_firing.items()))
    return msgspec.structs.replace(state, firing=kept), tuple(notices)


def _ended_ms(firing: Firing, state: AlertState, now_ms: int) -> int:
    """When an alert ended: when a node that was down answered again, otherwise when it was noticed."""
    back_ms = state.nodes.get(firing.subject, NodeMemory()).last_up_ms
    return back_ms if firing.code == "node_down" and back_ms > firing.since_ms else now_ms


Held = Mapping[tuple[str, str, int], Firing]
"""The alerts that fired before, by their identity."""


def _key(firing: Firing) -> tuple[str, str, int]:
    """The identity of an alert; a second failed swap is another alert."""
    return (firing.code, firing.subject, firing.since_ms if firing.code == "swap_failed" else 0)


def _on_the_stores_clock(fact: Fact) -> Fact:
    """A fact with what straightening left of its node's skew taken off: it is enough to be minutes off for an hour's
    figures, while seconds decide whether a node is silent."""
    skew_ms = fact.meta.clock_skew_ms or 0
    if not skew_ms or abs(skew_ms) > STRAIGHTEN_MS:
        return fact
    meta = fact.meta._replace(t_start_ms=fact.meta.t_start_ms - skew_ms, t_end_ms=fact.meta.t_end_ms - skew_ms)
    return Fact(meta, fact.ordinal, shifted(fact.record, skew_ms))


def _identity(fact: Fact) -> str:
    """Of an event, the same in each of its copies: by the times that its node wrote, since copies tell different
    skews."""
    wrote = msgspec.json.encode(shifted(fact.record, -(fact.meta.clock_skew_ms or 0)))
    return hashlib.blake2b(wrote, digest_size=8).hexdigest()


def _observe(nodes: dict[str, NodeMemory], fact: Fact, now_ms: int, config: Alerts) -> None:
    node, record, replace = fact.meta.node, fact.record, msgspec.structs.replace
    ended_ms = min(fact.meta.t_end_ms, now_ms)
    mine = nodes.get(node, NodeMemory())
    nodes[node] = mine = replace(mine, last_seen_ms=max(mine.last_seen_ms, ended_ms))
    nodes[node] = mine = _incarnation_seen(mine, fact.meta, ended_ms)
    if mine.down_since_ms is not None and ended_ms > mine.down_since_ms + GRACE_MS:
        nodes[node] = mine = replace(mine, down_since_ms=None, last_up_ms=ended_ms)
    if isinstance(record, HostSample):
        nodes[node] = replace(mine, warm=_warmed(mine, fact.meta, ended_ms, record, config.throttled_window_s * 1000))
    elif isinstance(record, ModelEvicted) and record.reason not in ("ordered", "idle"):
        oldest = mine.last_seen_ms - config.storm_window_s * 1000
        at = {_identity(fact): min(record.t_ms, now_ms), **mine.evicted}
        nodes[node] = replace(mine, evicted={one: t for one, t in at.items() if t > oldest})
    elif isinstance(record, AgentStarted | AuditRecovered):  # an agent that starts says so first
        nodes[node] = replace(mine, audit_well_ms=max(mine.audit_well_ms, min(record.t_ms, now_ms)))
    elif isinstance(record, AuditFailing):
        failing = (min(record.t_ms, now_ms), min(record.since_ms, now_ms), record.why, record.lost)
        nodes[node] = replace(mine, audit_failing=max(mine.audit_failing, failing))
    elif isinstance(record, _TOLD_TWICE) and (event := _identity(fact)) not in mine.told:
        nodes[node] = replace(mine, told=(*mine.told, event)[-TOLD:])
        _event(nodes, node, record, now_ms)


_TOLD_TWICE = (PeerDown, PeerUp, SwapFinished, NodeIdClash, CertificateExpires)


def _event(
    nodes: dict[str, NodeMemory],
    node: str,
    record: PeerDown | PeerUp | SwapFinished | NodeIdClash | CertificateExpires,
    now_ms: int,
) -> None:
    mine, replace = nodes[node], msgspec.structs.replace
    if isinstance(record, PeerDown):
        peer = nodes.get(record.peer, NodeMemory())
        # read late, or from a second witness: one from before the peer's return is outdated
        news = record.t_ms > peer.last_up_ms and record.last_seen_ms >= peer.last_seen_ms - GRACE_MS
        if news and peer.down_since_ms is None:
            nodes[record.peer] = replace(peer, down_since_ms=min(record.last_seen_ms, now_ms), reported_by=node)
    elif isinstance(record, PeerUp):
        peer = nodes.get(record.peer, NodeMemory())
        if peer.down_since_ms is not None and record.t_ms > peer.down_since_ms:
            up_ms = min(record.t_ms, now_ms)
            seen = max(peer.last_seen_ms, up_ms)
            nodes[record.peer] = replace(peer, down_since_ms=None, last_seen_ms=seen, last_up_ms=up_ms)
    elif isinstance(record, SwapFinished):
        finished = (min(record.t_ms, now_ms), record.outcome, record.reason)
        # the ordered copy of an older swap comes after the urgent copy of a newer one
        if finished[0] > mine.swaps.get(record.model, (0, "", ""))[0]:
            nodes[node] = replace(mine, swaps={**mine.swaps, record.model: finished})
    elif isinstance(record, NodeIdClash):
        twice = nodes.get(record.peer, NodeMemory())
        clash = (min(record.t_ms, now_ms), " and ".join(filter(None, (record.one, record.other))))
        nodes[record.peer] = replace(twice, clash=max(twice.clash, clash))
    else:
        reported = (min(record.t_ms, now_ms), record.not_after_ms)
        # at the same time, as after a change within one look, the later end is the newer certificate's
        if record.certificate in CERTIFICATES and reported > mine.certificates.get(record.certificate, (0, 0)):
            nodes[node] = replace(mine, certificates={**mine.certificates, record.certificate: reported})


def _warmed(memory: NodeMemory, meta: Meta, ended_ms: int, sample: HostSample, window_ms: float) -> tuple[Warm, ...]:
    """The newest windows of a node, as many as cover ``window_ms``."""
    batch = (meta.incarnation, meta.epoch, meta.seq)
    one = Warm(
        batch=batch,
        ended_ms=ended_ms,
        # a clock that was set within the window makes it look shorter
        length_ms=max(meta.t_end_ms - meta.t_start_ms, sample.thermal_known_us // 1000),
        throttled_us=sample.throttled_us,
        known_us=sample.thermal_known_us,
    )
    known = memory.warm if any(w.batch == batch for w in memory.warm) else (*memory.warm, one)
    kept, covered_ms = list[Warm](), 0
    for w in sorted(known, key=lambda w: (w.ended_ms, w.batch), reverse=True):
        if w.ended_ms > memory.last_seen_ms - window_ms and covered_ms < window_ms:
            kept.insert(0, w)
            covered_ms += w.length_ms
    return tuple(kept)


def _incarnation_seen(memory: NodeMemory, meta: Meta, ended_ms: int) -> NodeMemory:
    """Spools of one node follow each other; two whose windows take turns are two agents, each with a spool."""
    name, known = str(meta.incarnation), memory.incarnations
    if not meta.incarnation or ended_ms <= known.get(name, 0):
        return memory
    turn = name in known and any(known[name] < at < ended_ms for one, at in known.items() if one != name)
    turns = (*memory.taken_turns, ended_ms) if turn else memory.taken_turns
    recent = {one: at for one, at in known.items() if at > ended_ms - CLASH_FOR_MS}
    turns = tuple(t for t in turns if t > ended_ms - CLASH_FOR_MS)
    return msgspec.structs.replace(memory, incarnations={**recent, name: ended_ms}, taken_turns=turns[-TURNS:])


def _of_node(node: str, state: AlertState, held: Held, now_ms: int, config: Alerts) -> Sequence[Firing]:
    memory = state.nodes[node]
    found = [
        _down(node, memory, now_ms, config),
        _throttled(node, memory, held.get(("throttling", node, 0)), now_ms, config),
        _storm(node, memory, held.get(("eviction_storm", node, 0)), now_ms, config),
        _twice(node, memory, now_ms),
        _audit(node, memory, now_ms),
        *_swaps(node, memory, now_ms),
        *_certificates(node, memory, now_ms),
    ]
    return [f for f in found if f is not None]


def _down(node: str, memory: NodeMemory, now_ms: int, config: Alerts) -> Firing | None:
    if memory.down_since_ms is not None:
        text = f"{node} does not answer the heartbeats of {memory.reported_by or 'its peers'}"
        return Firing(code="node_down", subject=node, since_ms=memory.down_since_ms, text=text)
    silent_ms = now_ms - memory.last_seen_ms
    if memory.last_seen_ms and silent_ms > 2 * config.upload_s * 1000 + GRACE_MS:
        text = f"no telemetry arrives from {node}"
        return Firing(code="node_down", subject=node, since_ms=memory.last_seen_ms, text=text)
    return None


def _throttled(node: str, memory: NodeMemory, held: Firing | None, now_ms: int, config: Alerts) -> Firing | None:
    """By the windows before the node's last report, where four fifths of that time are known, as agents do. Where they
    are not, nothing begins, and what fired goes on: it ends by what is known, not by silence."""
    window_s = config.throttled_window_s
    warm = [w for w in memory.warm if w.ended_ms > now_ms - 2 * window_s * 1000]
    known_s, hot_s = (sum(getattr(w, name) for w in warm) / 1e6 for name in ("known_us", "throttled_us"))
    if known_s < KNOWN_SHARE * window_s:
        return held
    if (share := min(1.0, hot_s / known_s)) <= config.throttled_share:
        return None
    of_s = max(window_s, sum(w.length_ms for w in warm) / 1000)
    known = (
        f"the {known_s:.0f} s that are known of the last {of_s:.0f} s" if known_s < of_s else f"the last {of_s:.0f} s"
    )
    said = percent_beside(share, config.throttled_share, 0)
    text = f"{node} was thermally throttled for {hot_s:.1f} s, {said} of {known}"
    first = next(w for w in warm if w.throttled_us)
    return Firing(code="throttling", subject=node, since_ms=first.ended_ms - first.length_ms, text=text)


def _storm(node: str, memory: NodeMemory, held: Firing | None, now_ms: int, config: Alerts) -> Firing | None:
    """Of the time before now; it ends by the node's own reports, since one that is silent may evict on."""
    within_ms, at = config.storm_window_s * 1000, sorted(memory.evicted.values())
    recent = [t for t in at if t > now_ms - within_ms]
    if len(recent) < config.storm_evictions:
        still = sum(t > min(now_ms, memory.last_seen_ms) - within_ms for t in at) >= config.storm_evictions
        return held if still else None
    counted = "1 eviction" if len(recent) == 1 else f"{len(recent)} evictions"
    text = f"{counted} on {node} within {config.storm_window_s:.0f} s"
    return Firing(code="eviction_storm", subject=node, since_ms=recent[0], text=text)


def _twice(node: str, memory: NodeMemory, now_ms: int) -> Firing | None:
    """Seen by an agent or a peer, or by two spools of one node that take turns (one turn is a state folder that was
    put back)."""
    seen_ms, marks = memory.clash
    turns = [t for t in memory.taken_turns if t > now_ms - CLASH_FOR_MS]
    if seen_ms <= now_ms - CLASH_FOR_MS and len(turns) < TURNS:
        return None
    text = f"two agents report as {node}" + (f" ({marks})" if marks else "")
    since_ms = seen_ms if seen_ms > now_ms - CLASH_FOR_MS else turns[0]
    return Firing(code="node_id_clash", subject=node, since_ms=since_ms, text=f"{text}: each needs its own node.id")


_AUDIT_WHY = {
    "full": "its disk is full",
    "read_only": "its disk is read-only",
    "deleted": "its folder was deleted or replaced",
    "no_answer": "its disk does not answer",
}


def _audit(node: str, memory: NodeMemory, now_ms: int) -> Firing | None:
    """Until the agent says that it is written again, or starts again, or no longer says that it fails."""
    told_ms, since_ms, why, lost = memory.audit_failing
    if told_ms <= max(memory.audit_well_ms, now_ms - AUDIT_FOR_MS):
        return None
    missing = f"; {lost} entries are missing" if lost else ""
    text = f"the audit log of {node} cannot be written: {_AUDIT_WHY.get(why, 'its disk fails')}{missing}"
    return Firing(code="audit_failing", subject=node, since_ms=since_ms, text=text)


def _swaps(node: str, memory: NodeMemory, now_ms: int) -> list[Firing]:
    return [
        Firing(code="swap_failed", subject=f"{node}/{model}", since_ms=t_ms, text=reason or "no reason reported")
        for model, (t_ms, outcome, reason) in sorted(memory.swaps.items())
        if outcome == "failed" and now_ms - t_ms < SWAP_FAILED_FOR_S * 1000
    ]


def _certificates(node: str, memory: NodeMemory, now_ms: int) -> list[Firing]:
    """One alert from each of ``EXPIRY_DAYS`` on, until another certificate is reported."""
    found = []
    for code, days in zip(("certificate_expires", "certificate_expires_soon"), EXPIRY_DAYS, strict=True):
        for name, (_, ends_ms) in sorted(memory.certificates.items()):
            from_ms = ends_ms - days * DAY_MS
            if from_ms <= now_ms:
                text = f"the {name} certificate of {node} {_ends(ends_ms - now_ms)}"
                found.append(Firing(code=code, subject=f"{node}/{name}", since_ms=from_ms, text=text))
    return found


def _ends(left_ms: int) -> str:
    if left_ms <= 0:
        return "has expired"
    days = left_ms // DAY_MS
    return "expires within a day" if not days else f"expires in {days} day{'' if days == 1 else 's'}"
