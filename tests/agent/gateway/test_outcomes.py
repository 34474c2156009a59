"""How requests that ended count: every code that can end one has its outcome and its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.api.errors import STATUS
from agent.gateway.outcomes import AT_FAULT, BY_CODE, FAILED, ended
from agent.wire.frames import CRASHED, SUSPECT
from shared.errors import Halt, NotFound, RackError, Refused, Retryable

WAYS = ("agent/gateway", "agent/api", "agent/process", "agent/models/pool.py", "agent/mesh/peer_link.py")
"""Where a client's request passes."""
OTHERS = {"no_process"}
"""Codes there that end no request: a loader that does not start."""
ADMIN = {"no_memory", "disk_full"}
NAMES = {"CRASHED": CRASHED, "SUSPECT": SUSPECT}


def raised(path: Path) -> Iterator[str]:
    """Codes of errors that a client may meet again without changing anything."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        named = {one.arg: one.value for one in node.keywords}
        later = node.func.id in ("Retryable", "Turn") or (node.func.id == "Failed" and "retryable" in named)
        code = named.get("code") if later else None
        if isinstance(code, ast.Constant):
            yield str(code.value)
        elif isinstance(code, ast.Name) and code.id in NAMES:
            yield NAMES[code.id]


def test_every_code_that_ends_a_request_and_is_not_its_clients_has_an_outcome_and_a_reason() -> None:
    files = [file for way in WAYS for file in (Path(way).rglob("*.py") if Path(way).is_dir() else [Path(way)])]
    found = {code for file in files for code in raised(file)} - OTHERS
    assert {"queue_full", "worker_lost", "connections_full", "no_capacity", "deadline_exceeded"} <= found
    assert not found - set(BY_CODE)
    told = {code for code, status in STATUS.items() if status == 429 or status >= 500} - ADMIN
    assert not told - set(BY_CODE)


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        *((code, "refused", "capacity") for code in ("draining", "queue_full", "bodies_full", "connections_full")),
        *((code, "refused", "limit") for code in ("key_queue_full", "key_bodies_full")),
        *((code, "failed", "capacity") for code in ("no_capacity", "memory_pressure", "not_ready", "provider_busy")),
        *((code, "failed", "") for code in ("provider_failed", "provider_setup", "provider_timeout")),
        *((code, "failed", "") for code in ("worker_lost", "loader_lost", "engine_failed", "deadline_exceeded")),
        *((code, "failed", "") for code in (CRASHED, SUSPECT, "unavailable", "of_tomorrow")),
    ],
)
def test_what_the_rack_could_not_do_is_never_the_requests_fault(code: str, outcome: str, reason: str) -> None:
    assert ended(Retryable("x", code=code)) == (outcome, reason)


@pytest.mark.parametrize("code", [code for code, status in STATUS.items() if status < 429 or code in ADMIN])
def test_what_the_client_must_change_is_its_requests_fault(code: str) -> None:
    assert ended(Refused("x", code=code)) == AT_FAULT == ("refused", "request")


def test_errors_of_other_kinds() -> None:
    assert ended(Refused("x", code="loop")) == ("refused", "capacity"), "a node's peers.nodes is wrong"
    assert ended(NotFound("x")) == AT_FAULT
    assert ended(Halt("x")) == ended(RackError("x")) == FAILED
