"""No duration is a difference of two times of day: a clock that is set back makes it negative, one that jumps makes it
hours. Durations come from the monotonic clock; the time of day is for records and between machines."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent.config import Node
from agent.mesh.signing import RackKeys
from agent.status import Status

ROOT = Path(__file__).parents[2]
READS = ("time", "time_ns", "now", "utcnow", "wall", "wall_ms", "_wall", "_wall_ms")
BETWEEN_CLOCKS = {
    "agent/schedule.py",  # compares this machine's two clocks, to see jumps
    "agent/mesh/tls.py",  # certificates end at a time of day
}


def of_day(node: ast.AST) -> bool:
    """Whether an expression reads the time of day."""
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name | ast.Attribute)
        and (call.func.id if isinstance(call.func, ast.Name) else call.func.attr) in READS
        for call in ast.walk(node)
    )


def differences(source: str) -> list[int]:
    """The lines that subtract the time of day, or a name that was just set to it."""
    tree = ast.parse(source)
    names = {
        target.id if isinstance(target, ast.Name) else target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and of_day(node.value)
        for target in node.targets
        if isinstance(target, ast.Name | ast.Attribute)
    }

    def is_time(side: ast.expr) -> bool:
        named = side.id if isinstance(side, ast.Name) else side.attr if isinstance(side, ast.Attribute) else ""
        return of_day(side) or named in names

    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and (is_time(node.left) or is_time(node.right))
    ]


def test_no_duration_comes_from_the_time_of_day() -> None:
    paths = sorted((ROOT / "agent").rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix(): lines for path in paths if (lines := differences(path.read_text()))}
    assert len(paths) > 100
    assert set(found) == BETWEEN_CLOCKS, found


def test_the_search_finds_them() -> None:
    assert differences("up = int(time.time()) - self.started")
    assert differences("began = time.time_ns()\nf(clock() - began)")
    assert differences("self.at = datetime.now(UTC)\nx = then - self.at")
    assert not differences("up = time.monotonic() - began")


def test_an_agents_uptime_never_goes_back() -> None:
    now = [5.0]
    parts: list[Any] = [SimpleNamespace()] * 7
    status = Status(Node(id="n1", rack="r"), *parts, boundary=parts[0], keys=RackKeys(), clock=lambda: now[0])
    now[0] += 90.5
    assert status.uptime_s() == 90
