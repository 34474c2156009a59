"""One key through all gateways of a rack: its limits hold, whoever is cut off or killed, and it can see them.

`MLXRACK_LIMITS_FULL=1` takes eight gateways and whole minutes instead of four and two seconds."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.rack.harness import SCRIPT, Agent, Answer, model, rack, until
from tests.rack.limited_agent import WINDOW_S
from tests.rack.links import Links

FULL = os.environ.get("MLXRACK_LIMITS_FULL") == "1"
GATEWAYS, WINDOW, LIMIT, TIMES = (8, 60.0, 240, 10) if FULL else (4, 2.0, 20, 4)
DAY = 10_000
SECRET, OTHER = "alice's key, 256 random bits", "bob's key, other random bits"
KEYS = "".join(
    f'[[keys]]\nid = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
    for name, secret in (("alice", SECRET), ("bob", OTHER))
)


class Sent(NamedTuple):
    """A request: when it was sent, when its answer was complete, and its status."""

    sent_s: float
    ended_s: float
    status: int
    port: int


@contextlib.contextmanager
def limited(folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, links: Links) -> Iterator[list[Agent]]:
    """A rack whose agents keep the limits of a policy. The first and the last compute; all are gateways."""
    (folder / "policy.toml").write_text(policy)
    monkeypatch.setenv(WINDOW_S, str(WINDOW))
    policed = f"{KEYS}[policy]\npath = {json.dumps(str(folder / 'policy.toml'))}\n"
    models = [[model()], *([] for _ in range(GATEWAYS - 2)), [model()]]
    with rack(folder, *models, extra=policed, start=False, links=links) as agents:
        for agent in agents:
            agent.program = [sys.executable, "-m", "tests.rack.limited_agent"]
            agent.start(wait=False)
        agents[0].ready()
        agents[-1].ready()
        for agent in agents:
            until(lambda agent=agent: agent.get("/health").status == 200, "it answers")  # type: ignore[misc]
            until(lambda agent=agent: all(p["state"] == "up" for p in agent.status()["peers"]), "peers are up")  # type: ignore[misc]
            until(lambda agent=agent: not any(one["waits"] for one in limits(agent)), "it knows what is used")  # type: ignore[misc]
        yield agents


def limits(agent: Agent) -> Any:
    return agent.admin("GET", "limits").json["limits"]


def ask(agent: Agent, secret: str = SECRET) -> Answer:
    return agent.chat("hi", headers={"Authorization": f"Bearer {secret}"}, max_tokens=2)


def used(agent: Agent, secret: str = SECRET) -> Any:
    return agent.get("/v1/usage", Authorization=f"Bearer {secret}").json


class Drive:
    """Clients that send ``per_s`` requests a second to each gateway, whatever the answers."""

    def __init__(self, agents: Sequence[Agent], per_s: float) -> None:
        self.found: list[Sent] = []
        self.refused: list[Answer] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._drive, args=(agent, per_s)) for agent in agents]

    def __enter__(self) -> "Drive":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _drive(self, agent: Agent, per_s: float) -> None:
        while not self._end.is_set():
            sent_s = time.monotonic()
            answer = ask(agent)
            self.found.append(Sent(sent_s, time.monotonic(), answer.status, agent.port))
            self.refused += [answer] if answer.status == 429 else []
            self._end.wait(max(0.0, sent_s + 1 / per_s - time.monotonic()))

    def served(self) -> list[Sent]:
        return [one for one in list(self.found) if one.status == 200]

    def most_in_a_window(self) -> int:
        """The most requests that certainly began within one window: sent in it and answered in it."""
        served = self.served()
        return max(
            sum(one.sent_s >= first.sent_s and one.ended_s <= first.sent_s + WINDOW for one in served)
            for first in served
        )


POLICY_TEXT = f"""
[[keys]]
id = "alice"
requests_per_minute = {LIMIT}
day = {{requests = {DAY}, usd = "5"}}
"""


def split(links: Links, agents: Sequence[Agent]) -> None:
    """Cut one half of the nodes off from the other."""
    middle = len(agents) // 2
    for one in agents[:middle]:
        for other in agents[middle:]:
            links.set("reset", source=one.node, sink=other.node)
            links.set("reset", source=other.node, sink=one.node)


def by_name(agent: Agent, name: str) -> Any:
    return next(one for one in limits(agent) if one["name"] == name)


@pytest.mark.timeout(1800)
def test_a_key_at_many_times_its_limit_through_all_gateways_of_a_rack_that_splits_and_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Links() as links, limited(tmp_path, monkeypatch, POLICY_TEXT, links) as agents:
        with Drive(agents, TIMES * LIMIT / WINDOW / GATEWAYS) as drive:
            until(lambda: len(drive.served()) >= 1.5 * LIMIT, "a window and a half was used", 20 * WINDOW)
            split(links, agents)
            parted, before = time.monotonic(), len(drive.served())
            until(lambda: time.monotonic() > parted + 1.2 * WINDOW, "a window passed")
            until(lambda: len(drive.served()) >= before + LIMIT / 2, "both halves still serve", 20 * WINDOW)
            links.set("healthy")
            if FULL:
                agents[1].kill()
                agents[1].start()
            healed, before = time.monotonic(), len(drive.served())
            until(lambda: time.monotonic() > healed + 1.2 * WINDOW, "a window passed")
            until(lambda: len(drive.served()) >= before + LIMIT / 2, "all serve", 20 * WINDOW)
        assert drive.most_in_a_window() <= LIMIT
        refused = next(one for one in drive.refused if "held by other nodes" not in one.json["error"]["message"])
        assert refused.json["error"]["code"] == "rate_limited"
        assert int(refused.headers["Retry-After"]) >= 1

        # killed and started again, a node knows what it let through
        counted = [by_name(agent, "day.requests")["used_here"] for agent in agents]
        assert sum(counted) >= len(drive.served())
        agents[1].kill()
        agents[1].start()
        assert by_name(agents[1], "day.requests")["used_here"] == counted[1]
        # what was used anywhere is known everywhere, to the key itself and to nobody else
        for agent in agents:
            until(
                lambda agent=agent: used(agent)["limits"][1]["used"] == sum(counted),  # type: ignore[misc]
                "all nodes know what was used",
                30,
            )
            assert used(agent)["limits"][1]["left"] == DAY - sum(counted)
        assert used(agents[1], OTHER)["limits"] == []
        assert agents[1].get("/v1/usage").status == 401
        # alone, a gateway soon has what the others do not need
        with Drive(agents[-1:], 2 * LIMIT / WINDOW) as alone:
            until(lambda: alone.served() and alone.most_in_a_window() >= 0.9 * LIMIT, "it has nearly all", 20 * WINDOW)
        assert alone.most_in_a_window() <= LIMIT

        shown = subprocess.run(
            [SCRIPT, "limits", "--config", str(agents[0].config)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        assert "requests_per_minute" in shown
        assert "divided among n1, n2" in shown
        command = [SCRIPT, "limits", "--json", "--config", str(agents[0].config)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert {one["name"] for one in json.loads(told)["limits"]} == {"requests_per_minute", "day.requests", "day.usd"}
