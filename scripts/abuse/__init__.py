"""``make abuse``: what an attacker with one key, a stranger on the LAN and a broken neighbour send, and what happens.

A case is a function of a module of this package; it starts what it needs on loopback in a folder of its own and returns
whether what it saw is what was intended, and what it saw. Each runs in a process group of its own, for a bounded time.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from agent.config import hash_key
from scripts.seaweed import free_port
from tests.rack.harness import Agent, Answer, write_config

KEYS = {name: f"mlxr-abuse-{name}-{'0' * 32}" for name in ("alice", "bob")}


class Seen(NamedTuple):
    """What a case saw, in a few words, and whether it is what was intended."""

    ok: bool
    words: str


class Place(NamedTuple):
    """Where a case runs; ``quick`` asks for fewer repetitions."""

    folder: Path
    quick: bool

    def size(self, full: int, quick: int) -> int:
        """How often to do something."""
        return quick if self.quick else full


class Case(NamedTuple):
    """One row of the table. ``limit_s`` bounds it at full size."""

    name: str
    finding: str
    given: str
    expected: str
    run: Callable[[Place], Seen]
    limit_s: float = 180.0


CASES: list[Case] = []


def case(
    name: str, finding: str, given: str, expected: str, *, limit_s: float = 180.0
) -> Callable[[Callable[[Place], Seen]], Callable[[Place], Seen]]:
    """Add a case to the table."""

    def add(run: Callable[[Place], Seen]) -> Callable[[Place], Seen]:
        CASES.append(Case(name, finding, given, expected, run, limit_s))
        return run

    return add


def all_of(*checks: tuple[bool, str]) -> Seen:
    """Several checks as one: what was seen of each, those that failed marked."""
    return Seen(all(ok for ok, _ in checks), "; ".join(words if ok else f"WRONG: {words}" for ok, words in checks))


# ---- agents ----


def keys(**more: str) -> str:
    """Two API keys, as agent.toml has them; ``more`` are further lines of a key's table."""
    tables = [f'[[keys]]\nid = "{name}"\nsha256 = "{hash_key(key)}"\n' for name, key in KEYS.items()]
    return "".join(table + more.get(name, "") for name, table in zip(KEYS, tables, strict=True))


def agent_of(
    place: Place, models: Sequence[dict[str, Any]], extra: str = "", node: str = "n1", *, start: bool = True
) -> Agent:
    """One agent on loopback; its process ends with the case's."""
    made = Agent(place.folder, node, free_port())
    write_config(made, [], models, extra)
    return made.start().ready() if start else made


def as_key(name: str) -> dict[str, str]:
    """The header of one of the two keys."""
    return {"Authorization": f"Bearer {KEYS[name]}"}


def restarts(agent: Agent) -> int:
    """How often loaders were started again."""
    return sum(int(model["restarts"]) for model in agent.status()["models"])


def command(agent: Agent, *words: str, limit_s: float = 120) -> tuple[int, str]:
    """Exit status and output of `mlxrack-agent`."""
    return program("mlxrack-agent", *words, "--config", str(agent.config), limit_s=limit_s)


def program(name: str, *words: str, limit_s: float = 300, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of one of the programs."""
    import subprocess
    import sys

    run = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *words],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={**os.environ, **(environ or {})},
    )
    return run.returncode, run.stdout + run.stderr


def log_of(agent: Agent) -> str:
    """All of an agent's log."""
    return "".join(path.read_text(errors="replace") for path in sorted((agent.state / "logs").glob("agent.jsonl*")))


def code_of(answer: Answer) -> str:
    """The error code of an answer; "" where there is none."""
    try:
        return str(json.loads(answer.body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


class Watch:
    """The most memory that a process had, and the slowest answer of /health, until the block ends."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._done = agent, threading.Event()
        self.peak_mb, self.slowest_s = 0.0, 0.0
        assert agent.process is not None
        self._process = psutil.Process(agent.process.pid)
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._memory, self._health)]

    def _memory(self) -> None:
        while not self._done.wait(0.05):
            try:
                self.peak_mb = max(self.peak_mb, self._process.memory_info().rss / 1e6)
            except psutil.Error:
                return

    def _health(self) -> None:
        while not self._done.wait(0.2):
            began = time.monotonic()
            self._agent.get("/health")
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(10)
