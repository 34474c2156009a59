"""The rules by which silence of a node is explained: by its next start, or by its peers. Pure."""

from aggregator.calendar import HOUR_MS
from aggregator.fleet import JOIN_MS
from aggregator.window import Window
from shared.records import (
    AgentStarted,
    AgentStopped,
    MemoryPressed,
    PeerDown,
    PeerUp,
    SwapFinished,
    ThrottleEnded,
    ThrottleEvent,
)

GRACE_MS = 30_000
"""A node with a window that ends later than this after a peer last saw it has reported again."""
NEAR_MS = 300_000
LONG_HEAT_MS = 6 * HOUR_MS
"""How long before an incident a throttle event may have begun to count as its cause."""


def cause_of(window: Window, node: str, start: int, end: int) -> tuple[str, str, str] | None:
    """Why a node did not report; the first rule that matches.

    1. clean stop, by what the next start or the last window says; 2. hard memory pressure just before; 3. throttled at
    the time; 4. a swap had just ended; 5. the machine rebooted; 6. only the agent restarted; 7. its peers could not
    reach it, and it came back without a restart, or with another state folder, which knows nothing of the time before.
    """
    begun = _begun(window, node, start, end)
    if begun is not None and (begun.previous == "clean" or was_stopped(window, node, start)):
        return "stopped", "agent stopped by an operator", "restarted"
    fresh = begun is not None and begun.previous == "first"
    if begun is not None and not fresh:
        near = (start - NEAR_MS, start + JOIN_MS)
        if any(m.node == node and r.level == "hard" and _within(r.t_ms, near) for m, r in window.of(MemoryPressed)):
            return "out_of_memory", "memory pressure just before the agent ended", "move a model away, or lower rows"
        if _was_hot(window, node, start):
            return "heat", "the node was thermally throttled when it ended", "improve cooling or airflow"
        if any(m.node == node and _within(r.t_ms, near) for m, r in window.of(SwapFinished)):
            return "deploy", "a swap had just ended on the node", "compare the new version with the previous one"
        boots = {run.boot_id for run in window.runs if run.node == node}
        if len(boots - {None, ""}) > 1 and _rebooted(window, node, start, end):
            return (
                "power",
                ("the machine rebooted: power loss or kernel panic (look for a .panic file that mentions IOGPUMemory)"),
                "check the power supply; see the runbook on panics",
            )
        return "crash", "the agent ended unexpectedly", "restarted by launchd or an operator"
    if any(record.peer == node and start - GRACE_MS <= record.t_ms <= end for _, record in window.of(PeerDown)):
        if fresh:
            return "unknown", "no answer to heartbeats of its peers", "replaced, or its state folder was lost"
        return "network", "unreachable for its peers", "recovered without a restart: check the network"
    return None


def _begun(window: Window, node: str, start: int, end: int) -> AgentStarted | None:
    """The start that ended a gap: said in the first window after it, however long the start took."""
    for meta, record in window.of(AgentStarted):
        if meta.node == node and (start <= record.t_ms <= end + JOIN_MS or abs(meta.t_start_ms - end) <= JOIN_MS):
            return record
    return None


def was_stopped(window: Window, node: str, t_ms: int) -> bool:
    """Whether a node's last window before a gap ends with its stop: what follows, a start that failed for one, does
    not change that."""
    return any(m.node == node and abs(m.t_end_ms - t_ms) <= JOIN_MS for m, _ in window.of(AgentStopped))


def _was_hot(window: Window, node: str, t_ms: int) -> bool:
    """Whether the node was throttled at that time: begun and not ended before."""
    begun = [r.t_ms for m, r in window.of(ThrottleEvent) if m.node == node and r.t_ms <= t_ms]
    ended = [r.t_ms for m, r in window.of(ThrottleEnded) if m.node == node and r.t_ms <= t_ms - NEAR_MS]
    return bool(begun) and max(begun) > max(ended, default=0) and t_ms - max(begun) < LONG_HEAT_MS


def _within(t_ms: int, near: tuple[int, int]) -> bool:
    return near[0] <= t_ms <= near[1]


def _rebooted(window: Window, node: str, start: int, end: int) -> bool:
    """Whether the machine rebooted between the runs before and after a gap."""
    runs = sorted((r for r in window.runs if r.node == node), key=lambda r: r.since_ms)
    before = [r.boot_id for r in runs if r.since_ms < start]
    after = [r.boot_id for r in runs if r.since_ms >= end - JOIN_MS]
    return bool(before and after and before[-1] and after[0] and before[-1] != after[0])


def down_now(window: Window, node: str) -> int | None:
    """When the peers declared the node down, unless a peer has seen it since or it was stopped cleanly."""
    downs = [r.last_seen_ms for _, r in window.of(PeerDown) if r.peer == node]
    ups = [r.t_ms for _, r in window.of(PeerUp) if r.peer == node]
    stops = [r.t_ms for m, r in window.of(AgentStopped) if m.node == node]
    last = max(downs, default=None)
    if last is None or any(t > last for t in ups) or any(t >= last - JOIN_MS for t in stops):
        return None
    return last
