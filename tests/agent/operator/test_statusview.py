"""The human-readable status page."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.decisions import Decisions, Trail, shown
from agent.gateway.routing import choose
from agent.operator import legend
from agent.operator.statusview import models_text, progress, size, status_text, table, why_text
from tests.agent.gateway.test_routing import AWAY, HERE, WANTED, node

MODEL: dict[str, Any] = {
    "names": ["chat", "chat-next"],
    "state": "ready",
    "version": "45bcb267913e2ed6",
    "pid": 7,
    "in_flight": 3,
    "waiting": 0,
    "pinned": True,
    "need_bytes": 2_300_000_000,
    "footprint_bytes": 699_000_000,
    "plan_error_ppm": -12_345,
    "restarts": 1,
    "reason": "",
    "last_exit": "signal 9 (SIGKILL)",
    "conversation": {"tools": "native, parallel", "system": "native"},
}
COLD = {
    **MODEL,
    "names": ["code"],
    "state": "cold",
    "version": "",
    "pid": None,
    "pinned": False,
    "footprint_bytes": None,
    "plan_error_ppm": None,
    "waiting": 4,
    "reason": "load code: 2 MB over the memory budget",
}
SWAP = {
    "swap": "1-chat",
    "model": "chat",
    "from": "45bcb267913e2ed6",
    "to": "6250d00bb2663944",
    "phase": "warming",
    "detail": "7 of 30 timed probes",
    "outcome": "",
    "reason": "",
}
STATUS: dict[str, Any] = {
    "node": "mini-1",
    "rack": "home",
    "version": "0.1.0",
    "uptime_s": 3_600,
    "draining": False,
    "in_flight": 3,
    "budget_bytes": 16_900_000_000,
    "budget_from": "recommended for Apple M4",
    "memory": {"level": "calm", "held_bytes": 0, "refusing": False},
    "models": [MODEL, COLD],
    "swaps": [{**SWAP, "outcome": "failed", "reason": "too slow"}, SWAP],
    "breakers": [
        {"node": "mini-3", "model": "chat", "state": "open", "for_s": 1.5, "reason": "peer mini-3: broke off"}
    ],
    "peers": [{"node": "mini-2", "state": "up", "models": ["chat"], "problem": ""}],
    "push": {
        "state": "idle",
        "reason": "",
        "sent_batches": 5,
        "waiting_batches": 0,
        "held_windows": 2,
        "dropped_batches": 0,
        "disk_problem": "spool: write s: No space left on device",
    },
    "meters": [
        {"meter": "shelf", "nodes": ["mini-1", "mini-2"], "watts": 71.5, "problem": ""},
        {"meter": "spare", "nodes": ["mini-3"], "watts": None, "problem": "no answer within 4 s"},
    ],
    "sources_failed": {"smc": "SMC: service AppleSMC not found"},
    "desired": {"generation": 3, "state": "drifted", "reason": "", "drift": ["chat serves a instead of b"]},
}


def test_the_page_shows_all_relevant_state() -> None:
    text = status_text(STATUS)
    for part in (
        "node mini-1 of rack home",
        "models hold 699 MB of 16.9 GB (recommended for Apple M4), 2.3 GB planned",
        "chat, chat-next  ready (pinned)  45bcb267  3",
        "-1.2 %",
        "last exit: signal 9 (SIGKILL)",
        "tools: native, parallel; system: native",
        "shelf  mini-1, mini-2  71.5 W",
        "spare  mini-3          -       no answer within 4 s",
        "smc                 SMC: service AppleSMC not found",
        "load code: 2 MB over the memory budget",
        "failed   too slow",
        "warming  7 of 30 timed probes",
        "45bcb267 -> 6250d00b",
        "desired state: generation 3, drifted\n  chat serves a instead of b",
        "telemetry: idle, 5 batches sent, 0 waiting, 2 in memory; spool: write s: No space left on device",
        "mini-3           chat   open   1.5 s  peer mini-3: broke off",
    ):
        assert part in text, part
    assert max(len(line) for line in text.splitlines()) < 140


def test_routing_decisions_are_explained() -> None:
    trail = Trail(request_id="req_1", t_ms=0, began_s=10.0, model="m", prompt_tok=12)
    peers = (node("a", load=3), node("b", state="down"))
    trail.add(10.001, "sent", "here", decision=choose(WANTED, HERE, peers))
    trail.add(10.5, "lost", "here", "the loader ended")
    trail.add(10.6, "waits", decision=choose(WANTED, AWAY, ()))
    text = why_text([shown(trail)])
    for words in (
        "req_1: model m",
        "12 prompt tokens; running",
        "sent here",
        "lost here: the loader ended",
        "not b: down",
    ):
        assert words in text
    assert "waits: no_capacity" in text
    assert json.dumps(shown(trail))


def test_decisions_in_a_large_rack_keep_the_relevant_nodes() -> None:
    trail = Trail(request_id="req_1", t_ms=0, began_s=0.0, model="m")
    peers = tuple(node(f"n{number:02}", load=number, draining=number > 80) for number in range(100))
    decision = choose(WANTED, AWAY, peers)
    trail.add(0.0, "sent", decision=decision)
    (step,) = shown(trail)["steps"]
    assert [one["node"] for one in step["candidates"]] == [f"n{number:02}" for number in range(12)]
    trail.add(0.0, "waits", decision=choose(WANTED, AWAY, peers[90:]))
    assert list(shown(trail)["steps"][1]["excluded"].values()) == ["loading", *["draining"] * 10]


def test_recent_decisions_are_found_by_partial_id() -> None:
    kept = Decisions(kept=3)
    for name in ("old", "req_1", "req_1-1", "req_1-2"):
        kept.keep(Trail(request_id=name, t_ms=0, began_s=0.0, model="m"))
    assert [one.request_id for one in kept.find("req_1")] == ["req_1", "req_1-1", "req_1-2"]
    assert kept.find("old") == []
    assert [one.request_id for one in kept.last(2)] == ["req_1-2", "req_1-1"]


def test_absent_sections_are_omitted() -> None:
    quiet = {**STATUS, "swaps": [], "peers": [], "desired": {**STATUS["desired"], "generation": 0}}
    text = status_text(quiet)
    assert "SWAP" not in text
    assert "PEER" not in text
    assert "desired" not in text


def test_lines_that_the_log_lost_are_shown() -> None:
    full = {"lost_lines": 7, "problem": "No space left on device"}
    assert "log: 7 lines could not be written, No space left on device" in status_text({**STATUS, "log": full})
    assert "7 lines could not be written; lines are" in status_text({**STATUS, "log": {**full, "problem": ""}})
    assert "could not be written" not in status_text({**STATUS, "log": {"lost_lines": 0, "problem": ""}})


def test_connections_are_shown_once_some_were_turned_away() -> None:
    found = {"open": 160, "limit": 160, "per_address": 120, "dropped": 300, "refused": 2, "overdue": 4}
    text = status_text({**STATUS, "connections": found})
    assert "connections: 160 of 160 open; since the start 300 closed for others, 2 refused, 4 too slow" in text
    usual = {**found, "dropped": 0, "refused": 0}
    assert "connections:" not in status_text({**STATUS, "connections": usual})


def test_a_problem_of_the_store_is_shown_with_its_begin() -> None:
    began = {"reason": "get x: what answered is not an S3 store", "since_ms": 1_795_219_200_000}
    push = {**STATUS["push"], "state": "waiting", **began}
    desired = {"generation": 0, "state": "failed", "drift": [], **began}
    text = status_text({**STATUS, "push": push, "desired": desired})
    assert text.count("not an S3 store (since 2026-11-21 00:00:00 UTC)") == 2


def test_low_memory_is_shown() -> None:
    short = {"level": "hard", "held_bytes": 9, "refusing": True}
    assert "memory pressure: hard, new requests are refused" in status_text({**STATUS, "memory": short})


@pytest.mark.parametrize(
    ("verb", "model", "expected"),
    [
        ("swap", "chat", "warming 7 of 30 timed probes"),
        ("unload", "chat", "ready, 3 requests in flight"),
        ("load", "code", "cold, 3 requests in flight"),
        ("load", "nobody", ""),
    ],
)
def test_progress_is_one_line(verb: str, model: str, expected: str) -> None:
    assert expected == progress(STATUS, verb, model)


def test_sizes_and_tables_are_formatted() -> None:
    assert (size(None), size(5_400_000), size(5_400_000_000)) == ("-", "5 MB", "5.4 GB")
    assert table(("A", "BB"), [(1, "x"), ("long", "")]) == "A     BB\n1     x\nlong"
    assert models_text([]).startswith("MODEL")


def test_a_status_fits_a_terminal_of_eighty_columns() -> None:
    peer = "peer http://10.0.0.7:8470: node 'n2' answers at this url, which peers.nodes calls 'n6'; correct the id"
    status = {**STATUS, "peers": [{"node": "n6", "state": "down", "models": [], "problem": peer}]}
    text = status_text(status, 80)
    assert max(len(line) for line in text.splitlines()) <= 80, text
    flat = " ".join(text.split())
    for words in ("which peers.nodes calls 'n6'", "last exit: signal 9 (SIGKILL)", "2 MB over the memory budget"):
        assert words in flat, text
    assert status_text(STATUS) == status_text(STATUS, 0), "elsewhere nothing is wrapped"


WORDS = st.text("ab c-", max_size=90)


@given(st.lists(st.tuples(st.text("xyz", max_size=12), st.text("0-z", max_size=9), WORDS), max_size=5))
def test_a_table_on_a_terminal_loses_nothing_and_never_exceeds_it(rows: list[tuple[str, str, str]]) -> None:
    text = table(("NAME", "STATE", "NOTE"), rows, 80)
    assert all(len(line) <= 80 or " " not in line.strip() for line in text.splitlines())
    assert "".join(one[2] for one in rows if one[2]).replace(" ", "") == "" or all(
        word in text.replace("\n", " ") for one in rows for word in one[2].split() if len(word) < 30
    )


def test_the_legend_explains_every_column_and_fits() -> None:
    text = legend.text()
    assert max(len(line) for line in text.splitlines()) <= 80
    columns = ("IN FLIGHT", "QUEUED", "MEMORY", "PLANNED", "PLAN ERROR", "RESTARTS", "VERSION", "NOTE", "STATE")
    head = models_text([MODEL]).splitlines()[0]
    assert [name for name in columns if name not in text or name not in head] == []
    for state in ("cold", "starting", "ready", "draining", "failed", "closed", "out of rotation"):
        assert state in text, "of a model"
    for state in ("up", "suspect", "lost", "down", "unknown", "half_open", "probing"):
        assert state in text, "of a peer and a circuit breaker"
