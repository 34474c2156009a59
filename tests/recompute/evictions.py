"""Evictions and their verdicts, by the table in docs/reports.md, Evictions."""

from collections import Counter, defaultdict
from statistics import median_low
from typing import Any

from .happened import events
from .raw import Batch, Record

Found = dict[str, Any]
SOON_MS = 600_000
PING_PONG_MS = 2 * 3_600_000
BUSY_REQUESTS = 20
RANK = ("placement", "memory", "idle", "traffic", "ordered")
SHOWN = 10


def evictions(batches: list[Batch]) -> Found:
    """Rows of one model on one node, and totals over everything."""
    told = _Told(batches)
    by_row: dict[tuple[str, str], list[tuple[Record, str]]] = defaultdict(list)
    for node, one in told.evicted:
        by_row[node, one["model"]].append((one, told.verdict(node, one)))
    rows = [_row(node, model, mine, told) for (node, model), mine in by_row.items()]
    rows.sort(key=lambda row: (-row["evictions"], row["node"], row["model"]))
    left = rows[SHOWN:]
    return {
        "total": len(told.evicted),
        "rows": rows[:SHOWN],
        "left_out": len(left),
        "left_out_evictions": sum(row["evictions"] for row in left),
        "verdicts": dict(Counter(verdict for mine in by_row.values() for _, verdict in mine)),
        "models": _models(rows),
    }


def _row(node: str, model: str, mine: list[tuple[Record, str]], told: "_Told") -> Found:
    verdicts = Counter(verdict for _, verdict in mine)
    again = [after for one, _ in mine if (after := told.again_ms(node, one)) is not None]
    return {
        "node": node,
        "model": model,
        "evictions": len(mine),
        "justified": verdicts["traffic"],
        "bytes": max(one.get("bytes", 0) for one, _ in mine),
        "requests_last_hour": median_low(one.get("requests_last_hour", 0) for one, _ in mine),
        "reload_s": round(sum(one.get("reload_us", 0) for one, _ in mine) / 10**6, 3),
        "wanted_again_s": min(again) / 1000 if again else None,
        "verdict": max(RANK, key=lambda verdict: (verdicts[verdict], -RANK.index(verdict))),
        "verdicts": dict(verdicts),
    }


def _models(rows: list[Found]) -> list[Found]:
    found: dict[str, Found] = {}
    for row in rows:
        one = found.setdefault(row["model"], {"model": row["model"], "evictions": 0, "nodes": 0, "verdicts": Counter()})
        one["evictions"] += row["evictions"]
        one["nodes"] += 1
        one["verdicts"].update(row["verdicts"])
    return [one | {"verdicts": dict(one["verdicts"])} for one in found.values()]


class _Told:
    """What nodes told of evictions, misses and loads."""

    def __init__(self, batches: list[Batch]) -> None:
        self.evicted = events(batches, "model_evicted")
        self._missed = events(batches, "model_missed")
        self._loaded = events(batches, "model_loaded")

    def verdict(self, node: str, one: Record) -> str:
        """The first rule that holds."""
        plain = {"ordered": "ordered", "idle": "idle", "pressure": "memory"}
        if one["reason"] in plain:
            return plain[one["reason"]]
        after = self.again_ms(node, one)
        soon = after is not None and after < SOON_MS
        busy = one.get("requests_last_hour", 0) >= BUSY_REQUESTS
        return "placement" if soon or self._ping_pong(node, one) or not one.get("for_model") or busy else "traffic"

    def again_ms(self, node: str, one: Record) -> int | None:
        """How long after its eviction it was wanted again there."""
        model = one["model"]
        missed = [m for n, m in self._missed if (n, m["model"]) == (node, model)]
        later = [m["after_us"] // 1000 for m in missed if m["t_ms"] >= one["t_ms"]]
        if missed:
            return later[0] if later else None
        loads = [m["t_ms"] - one["t_ms"] for n, m in self._loaded if (n, m["model"]) == (node, model)]
        return min((after for after in loads if after >= 0), default=None)

    def _ping_pong(self, node: str, one: Record) -> bool:
        """Whether the model that it made room for was evicted for this one."""
        return any(
            n == node
            and (other["model"], other.get("for_model")) == (one.get("for_model"), one["model"])
            and abs(other["t_ms"] - one["t_ms"]) <= PING_PONG_MS
            for n, other in self.evicted
        )
