"""Long runs of a rack: on a saturated machine, and with clients that connect and disconnect."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.rack.harness import Agent, model, rack, until
from tests.rack.load import Ask, Load, quantile
from tests.rack.test_disconnects import leave

SOAK_S = float(os.environ.get("MLXRACK_SOAK_S", "8"))
STALL_S = 0.2


def burn(until_s: float) -> None:
    """Keep a core busy."""
    while time.monotonic() < until_s:
        sum(range(10_000))


def lines(agent: Agent, event: str) -> list[dict[str, Any]]:
    """Log lines of one event."""
    text = (agent.state / "logs" / "agent.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if f'"{event}"' in line]


@pytest.mark.timeout(SOAK_S + 900)
def test_a_busy_machine_and_stalls_mark_no_node_down(tmp_path: Path) -> None:
    worker = model(fake_step_s=0.01)
    with rack(tmp_path, *([worker] for _ in range(4))) as agents:
        until_s = time.monotonic() + SOAK_S
        burners = [multiprocessing.Process(target=burn, args=(until_s,)) for _ in range(os.cpu_count() or 2)]
        for burner in burners:
            burner.start()
        dice, rate = random.Random(2), 4
        plan = [(n / rate, Ask(f"go on {n % 7}", 10)) for n in range(int(SOAK_S * rate))]
        load = Load(plan, lambda n: agents[n % len(agents)].port).start()
        stalls = 0
        while time.monotonic() < until_s:
            victim = dice.choice(agents)
            assert victim.process is not None
            os.kill(victim.process.pid, signal.SIGSTOP)
            time.sleep(STALL_S)
            os.kill(victim.process.pid, signal.SIGCONT)
            stalls += 1
            time.sleep(dice.uniform(0.1, 0.6))
        everything = load.join()
        for burner in burners:
            burner.join()
        verdicts = sum(len(lines(agent, "peer_down")) for agent in agents)
        faults = [one.fault for one in everything if one.fault]
        first = [one.first_s for one in everything if one.first_s is not None]
        print(
            f"{SOAK_S:.0f} s at full load, {stalls} stalls of {STALL_S} s: {verdicts} nodes declared dead, "
            f"{len(everything)} requests, {len(faults)} failed, first token p99 {quantile(first, 0.99):.2f} s"
        )
        assert verdicts == 0
        assert not faults


def held(agent: Agent) -> tuple[int, int, int]:
    """Memory in bytes, descriptors, and tasks of an agent."""
    assert agent.process is not None
    process = psutil.Process(agent.process.pid)
    return process.memory_info().rss, process.num_fds(), agent.get("/debug/rack").json["tasks"]


@pytest.mark.timeout(SOAK_S + 900)
def test_connecting_and_disconnecting_clients_leak_nothing(tmp_path: Path) -> None:
    worker = model(rows=8, fake_step_s=0.01, fake_prefill_tps=2000)
    with rack(tmp_path, [], [worker], [worker]) as agents:
        door = agents[0]
        dice, stop = random.Random(8), threading.Event()

        def leavers() -> None:
            while not stop.is_set():
                leave(door.port, random.Random(dice.random()))

        def stayers(lasts_s: float) -> list[str]:
            plan = [(n / 20, Ask(f"stay {n % 9}", 10, stream=bool(n % 3))) for n in range(int(lasts_s * 20))]
            heard = Load(plan, lambda _: door.port).start().join()
            return [one.fault for one in heard if one.fault]

        threads = [threading.Thread(target=leavers) for _ in range(4)]
        for thread in threads:
            thread.start()
        faults = stayers(SOAK_S / 3)
        early = {agent.node: held(agent) for agent in agents}
        faults += stayers(SOAK_S * 2 / 3)
        stop.set()
        for thread in threads:
            thread.join()
        until(lambda: all(agent.status()["in_flight"] == 0 for agent in agents), "nothing is left")
        time.sleep(1.0)
        late = {agent.node: held(agent) for agent in agents}
        for node, (rss, files, tasks) in late.items():
            before = early[node]
            grew = (rss - before[0]) / 1e6
            print(f"{node}: memory {grew:+.1f} MB, descriptors {before[1]} -> {files}, tasks {before[2]} -> {tasks}")
            # the history of recent requests is bounded and fills in the first minutes
            assert grew < (10.0 if SOAK_S > 60 else 20.0)
            assert files <= before[1] + 2
            assert tasks <= before[2] + 2
        assert not faults, faults[:3]
