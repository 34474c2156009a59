"""What the columns and states of `mlxrack-agent status` mean. Pure."""

import textwrap

HINT = "`mlxrack-agent status --legend` explains the columns and states"
_TERMS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Models",
        (
            ("STATE", "cold (not in memory), starting, ready, draining (finishes its requests, then leaves memory),"),
            ("", "closed (drains for a model that waits), out of rotation (of a cold swap: peers serve it), failed"),
            ("", "(its loader cannot start or ended too often; `mlxrack-agent load` tries again)."),
            ("VERSION", "The first digits of the sha256 of its files' manifest; a swap changes it."),
            ("IN FLIGHT", "Requests that this node's loader has, queued in its engine or being computed."),
            ("QUEUED", "Requests that wait here until the model is in memory."),
            ("MEMORY", "What its loader takes now. It grows with the prompts that it computes and caches."),
            ("PLANNED", "What is reserved for it: weights, caches for `rows` requests, workspace, process."),
            ("PLAN ERROR", "How far the peak at its first prompt was above (+) or below (-) what was planned for that"),
            ("", "prompt. Above about +10 %: set need_bytes. - until it has answered one."),
            ("RESTARTS", "How often its loader was started again after it had ended by itself."),
            ("NOTE", "Why it is not ready, or how its loader last ended."),
        ),
    ),
    (
        "Peers",
        (
            ("STATE", "up, suspect (a heartbeat was missed: used only if nobody else can serve), lost (a request"),
            (
                "",
                "broke: nothing is sent before its next heartbeat), down (three were missed), unknown (just started).",
            ),
            ("MODELS", "Those that accept requests there."),
            ("NOTE", "Why it is not used. docs/runbooks.md: Peer rejected."),
        ),
    ),
    (
        "Circuit breakers",
        (
            (
                "STATE",
                "open (requests go elsewhere), half_open (the next one is let through), probing (it is on its way).",
            ),
            ("FOR", "How long it has been so."),
        ),
    ),
    (
        "Swaps",
        (
            ("VERSIONS", "The one that served and the one that takes over."),
            (
                "STATE",
                "starting, warming (timed probes), flipping, draining, stopping or restoring the old version; at",
            ),
            ("", "the end flipped (the new version serves) or failed (the old one does)."),
        ),
    ),
    (
        "Telemetry",
        (
            ("state", "idle (nothing was due yet), ok, waiting (the store is away: nothing is lost), refused (it"),
            ("", "needs you: the reason follows)."),
            ("sent, waiting", "Batches, one for each window of telemetry.sample_s seconds."),
        ),
    ),
)


def text(width: int = 80) -> str:
    """All of it, for a terminal of ``width`` columns."""
    left = max(len(term) for _, terms in _TERMS for term, _ in terms) + 4
    lines: list[str] = []
    for title, terms in _TERMS:
        lines += ["", title]
        for term, meaning in _joined(terms):
            first = f"  {term}".ljust(left)
            lines += textwrap.wrap(meaning, max(40, width), initial_indent=first, subsequent_indent=" " * left)
    return "\n".join(lines[1:])


def _joined(terms: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """A line without a term continues the one before."""
    found: list[tuple[str, str]] = []
    for term, meaning in terms:
        if term:
            found.append((term, meaning))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {meaning}")
    return found
