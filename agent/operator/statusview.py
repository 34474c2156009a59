"""The agent's status as human-readable tables. Pure."""

import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def status_text(s: dict[str, Any], width: int = 0) -> str:
    """The node, its models, peers, telemetry and last swaps, on so many columns (0: any number)."""
    lines = [
        f"node {s['node']} of rack {s['rack']}, mlxrack {s['version']}, up {_span(s['uptime_s'])}"
        + (", stopping" if s["draining"] else ""),
        f"{s['in_flight']} requests in flight; {_memory(s)}{_awake(s.get('awake', {}))}",
        *_policy_lines(s.get("policy", {})),
        *(f"warning: {warning}" for warning in s.get("warnings", ())),
        "",
        models_text(s["models"], width),
    ]
    talks = [(", ".join(m["names"]), talks_text(m["conversation"])) for m in s["models"] if m.get("conversation")]
    peers = [(p["node"], p["state"], ", ".join(p["models"]) or "-", _peer_note(p)) for p in s["peers"]]
    broken = [(b["node"], b["model"], b["state"], f"{b['for_s']} s", b["reason"]) for b in s["breakers"]]
    swaps = [(x["model"], f"{x['from'][:8]} -> {x['to'][:8]}", *_swap_words(x)) for x in s["swaps"]]
    lines += _section(("MODEL", "SERVED BECAUSE OF"), _origins(s["models"]), width)
    lines += _section(("MODEL", "CHAT TEMPLATE"), talks, width)
    lines += _section(_TIMED, _timed(s["models"]), width)
    lines += _section(("PEER", "STATE", "MODELS", "NOTE"), peers, width)
    lines += _section(("CIRCUIT BREAKER", "MODEL", "STATE", "FOR", "LAST FAILURE"), broken, width)
    lines += _section(("SWAP", "VERSIONS", "STATE", "NOTE"), swaps, width)
    lines += ["", _telemetry(s["push"]), *audit_lines(s.get("audit", {}))]
    meters = [(m["meter"], ", ".join(m["nodes"]), _watts(m["watts"]), m["problem"]) for m in s["meters"]]
    lines += _section(("METER", "NODES", "POWER", "NOTE"), meters, width)
    # a meter's problem is shown beside the meter
    silent = sorted((name, why) for name, why in s["sources_failed"].items() if not name.startswith("meter "))
    lines += _section(("SENSOR UNAVAILABLE", "REASON"), silent, width)
    lines += _desired_lines(s.get("desired"))
    lines += _connection_lines(s.get("connections", {}))
    lines += _log_lines(s.get("log", {}))
    return "\n".join(fold(line, width) for line in lines)


def _awake(found: Mapping[str, Any]) -> str:
    """Only where there is something to hold; why it is not held is among the warnings."""
    return {"held": "; kept awake", "not_held": "; not kept awake"}.get(str(found.get("state")), "")


def _policy_lines(found: Mapping[str, Any]) -> list[str]:
    """Only where there is a policy file; why it is not in force is among the warnings."""
    return [f"policy {found['version']} ({found['digest']})"] if found.get("path") else []


_TIMED = ("MODEL", "PREFILL", "ONE ANSWER", "STEP BY ROWS", "CHIP SHOULD REACH")


def _timed(models: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What calibrations measured, beside what the chip should reach."""
    found = list[tuple[str, ...]]()
    for one in models:
        if not (figures := one.get("figures")):
            continue
        steps = ", ".join(f"{rows}: {us / 1e3:.3g} ms" for rows, us in figures["step_us"].items())
        hopes = one.get("expected") or {}
        hoped = f"{hopes['prefill_tps']:.0f} and {hopes['decode_tps']:.3g} tokens/s" if hopes else "chip unknown"
        rates = (f"{figures['prefill_tps']:.0f} tokens/s", f"{figures['decode_tps']:.3g} tokens/s")
        found.append((", ".join(one["names"]), *rates, steps, hoped))
    return found


def _origins(models: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Where what is served comes from; nothing where all is as agent.toml says."""
    found = [(", ".join(m["names"]), m["origin"]) for m in models if m.get("origin")]
    if all(one["text"] in ("", "agent.toml") for _, one in found):
        return []
    return [(names, str(one["text"])) for names, one in found]


def fold(line: str, width: int) -> str:
    """A sentence on several lines; a table, which has line breaks already, and any line that fits stay as they are."""
    if not width or "\n" in line or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip(" -")) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _section(head: Sequence[str], rows: Sequence[Sequence[object]], width: int) -> list[str]:
    return ["", table(head, rows, width)] if rows else []


def _telemetry(push: dict[str, Any]) -> str:
    return (
        f"telemetry: {push['state']}, {push['sent_batches']} batches sent, {push['waiting_batches']} waiting"
        + (f", {push['held_windows']} in memory" if push["held_windows"] else "")
        + (f", {push['dropped_batches']} dropped" if push["dropped_batches"] else "")
        + "".join(f"; {problem}" for problem in (push["reason"] + _since(push), push["disk_problem"]) if problem)
    )


def audit_lines(found: Mapping[str, Any]) -> list[str]:
    """The audit log in one line."""
    if not found:
        return []
    if not found["enabled"]:
        return ["audit: off (audit.enabled)"]
    shipped = found["shipped"]
    state = f"FAILS{_since(found)}: {found['problem']}" if found["problem"] else f"ok, {found['seq']} lines"
    lost = f", {found['lost']} entries lost since the start" if found["lost"] else ""
    waiting = f", {shipped['waiting_files']} files wait for upload" if shipped["waiting_files"] else ""
    problem = f"; {shipped['problem']}" if shipped["problem"] else ""
    return [f"audit: {state}{lost}, {shipped['seq']} of them in the bucket{waiting}{problem}"]


def _peer_note(peer: dict[str, Any]) -> str:
    older = "needs the old rack secret, see `mlxrack-agent secrets`" if peer.get("needs_old_secret") else ""
    return "; ".join(words for words in (peer["problem"], older) if words)


def _watts(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} W"


def why_text(parts: Sequence[dict[str, Any]]) -> str:
    """The routing of a request, step by step."""
    lines = []
    for part in parts:
        lines.append(
            f"{part['request']}: model {part['model'] or 'unknown'}, about {part['prompt_tok_guess']} prompt tokens; "
            f"{part['outcome']}{' by ' + part['worker'] if part['worker'] else ''}"
        )
        for step in part["steps"]:
            words = " ".join(w for w in (step["what"], step.get("node", "")) if w)
            lines.append(f"{step['at_ms']:>10.1f} ms  {words}" + (f": {step['why']}" if step.get("why") else ""))
            if step.get("candidates"):
                head = ("NODE", "COST", "QUEUE", "PREFILL", "DECODE", "OTHERS", "PENALTY", "CACHED", "NOTE")
                text = table(head, [_candidate_row(one) for one in step["candidates"]])
                lines += ["               " + line for line in text.splitlines()]
            lines += [f"               not {node}: {why}" for node, why in step.get("excluded", {}).items()]
    return "\n".join(lines)


def models_text(models: Sequence[dict[str, Any]], width: int = 0) -> str:
    """The models of a node, one per line."""
    head = ("MODEL", "STATE", "VERSION", "IN FLIGHT", "QUEUED", "MEMORY", "PLANNED", "PLAN ERROR", "RESTARTS", "NOTE")
    return table(head, [_model_row(m) for m in models], width)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int = 0) -> str:
    """A table with columns as wide as their contents. On ``width`` columns (0: any number) it leaves out columns that
    say nothing when they are too many, and wraps the last one."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    if width and _width(cells) > width:
        last = len(head) - 1
        kept = [n for n in range(last + 1) if n in (0, last) or any(row[n] not in _SAYS_NOTHING for row in cells[1:])]
        cells = _merged([[row[n] for n in kept] for row in cells], width)
    widths = _widths(cells)
    left = sum(widths[:-1]) + 2 * len(widths[:-1])
    if not width or left + widths[-1] <= width:
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(line for row in cells for line in _wrapped(row, widths, left, width))


_SAYS_NOTHING = ("", "0", "-")
_LEAST_COLUMNS = 30
"""Where the last column would be narrower, it goes below the others."""


def _merged(cells: list[list[str]], width: int) -> list[list[str]]:
    """What no longer fits beside the first columns goes, with its heading, into the last one."""
    widths, last = _widths(cells), len(cells[0]) - 1
    fitting = sum(sum(widths[: n + 1]) + 2 * n <= width for n in range(last))
    if fitting in (0, last):
        return cells
    head, *rows = cells
    named = [(n, head[n].lower()) for n in range(fitting, last)]
    more = [[f"{name} {row[n]}" for n, name in named if row[n] not in _SAYS_NOTHING] for row in rows]
    ends = [
        "; ".join(part for part in (", ".join(one), row[last]) if part) for one, row in zip(more, rows, strict=True)
    ]
    return [[*head[:fitting], ""], *([*row[:fitting], end] for row, end in zip(rows, ends, strict=True))]


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]


def _width(cells: Sequence[Sequence[str]]) -> int:
    return sum(_widths(cells)) + 2 * (len(cells[0]) - 1)


def _wrapped(row: Sequence[str], widths: Sequence[int], left: int, width: int) -> list[str]:
    """A row whose last cell takes several lines, beside the others or below them."""
    first = "  ".join(c.ljust(w) for c, w in zip(row[:-1], widths, strict=False))
    beside = width - left >= _LEAST_COLUMNS
    indent = left if beside else 4
    if not beside and len(first.rstrip()) + 2 + len(row[-1]) <= width:
        return [f"{first.rstrip()}  {row[-1]}".rstrip()]
    lines = textwrap.wrap(row[-1], max(20, width - indent), break_on_hyphens=False, break_long_words=False) or [""]
    if not beside:
        return [first.rstrip(), *(" " * indent + line for line in lines if line)]
    return [f"{first}  {lines[0]}".rstrip(), *(" " * indent + line for line in lines[1:])]


def size(value: int | None) -> str:
    """Bytes for display."""
    return "-" if value is None else f"{value / 1e9:.1f} GB" if value >= 10**9 else f"{value / 1e6:.0f} MB"


def progress(s: dict[str, Any], verb: str, model: str) -> str:
    """Progress of an order in one line; "" when there is none to show."""
    if verb == "swap":
        swap = next((x for x in reversed(s["swaps"]) if not x["outcome"]), None)
        return f"{swap['phase']} {swap['detail']}".strip() if swap else ""
    if (one := next((m for m in s["models"] if model in m["names"]), None)) is None:
        return ""
    return f"{one['state']}, {one['in_flight']} requests in flight" if one["in_flight"] else str(one["state"])


def _model_row(m: dict[str, Any]) -> tuple[object, ...]:
    error = m["plan_error_ppm"]
    note = m["reason"] or (f"last exit: {m['last_exit']}" if m["last_exit"] else "")
    return (
        ", ".join(m["names"]),
        m["state"] + (" (pinned)" if m["pinned"] else ""),
        m["version"][:8] or "-",
        m["in_flight"],
        m["waiting"],
        size(m["footprint_bytes"]),
        size(m["need_bytes"]),
        "-" if error is None else f"{error / 1e4:+.1f} %",
        m["restarts"],
        note,
    )


def _candidate_row(one: dict[str, Any]) -> tuple[object, ...]:
    times = (f"{one[name]:.3f} s" for name in ("cost_s", "wait_s", "prefill_s", "answer_s", "others_s", "barrier_s"))
    return (one["node"], *times, f"{one['saved_tok']} tok", one.get("last_resort", ""))


def _memory(s: dict[str, Any]) -> str:
    held = sum(m["footprint_bytes"] or 0 for m in s["models"])
    planned = sum(m["need_bytes"] or 0 for m in s["models"] if m["pid"])
    text = f"models hold {size(held)} of {size(s['budget_bytes'])} ({s['budget_from']}), {size(planned)} planned"
    memory = s["memory"]
    if memory["level"] == "calm":
        return text
    return f"{text}; memory pressure: {memory['level']}{', new requests are refused' if memory['refusing'] else ''}"


def _swap_words(x: dict[str, Any]) -> tuple[str, str]:
    return (x["outcome"], x["reason"]) if x["outcome"] else (x["phase"], x["detail"])


def _desired_lines(desired: dict[str, Any] | None) -> list[str]:
    if not desired or not (desired["generation"] or desired["reason"]):
        return []
    first = f"desired state: generation {desired['generation']}, {desired['state']}"
    return [
        first + (f"; {desired['reason']}{_since(desired)}" if desired["reason"] else ""),
        *(f"  {d}" for d in desired["drift"]),
    ]


def _connection_lines(found: dict[str, Any]) -> list[str]:
    """Only what is unusual: connections that were closed for others, refused, or too slow."""
    if not any(found.get(name) for name in ("dropped", "refused")):
        return []
    closed = f"{found['dropped']} closed for others, {found['refused']} refused, {found['overdue']} too slow"
    return [f"connections: {found['open']} of {found['limit']} open; since the start {closed}"]


def _log_lines(log: dict[str, Any]) -> list[str]:
    """Only what is wrong: lines of the log that could not be written."""
    if not log.get("lost_lines"):
        return []
    now = f", {log['problem']}" if log["problem"] else "; lines are written again"
    return [f"log: {log['lost_lines']} lines could not be written{now}"]


def talks_text(found: Mapping[str, str]) -> str:
    """What the probe of a model's chat template found, in one line."""
    return "; ".join(f"{what}: {how}" for what, how in found.items())


def _since(problem: Mapping[str, Any]) -> str:
    """When a problem of the store began."""
    if (since_ms := problem.get("since_ms")) is None:
        return ""
    return f" (since {datetime.fromtimestamp(since_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC)"


def _span(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
