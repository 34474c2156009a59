"""Clients that disconnect or read slowly must not leak anything."""

import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.rack.harness import Agent, model, rack, until
from tests.rack.load import Ask, at_once

LEAVERS = int(os.environ.get("MLXRACK_LEAVERS", "60"))
SLOW = 50
BATCH = 20
STOPS_S = 0.25


def body(prompt: str, max_tokens: int, *, stream: bool) -> bytes:
    message = {"role": "user", "content": prompt}
    raw = json.dumps({"model": "m", "messages": [message], "max_tokens": max_tokens, "stream": stream}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw


def leave(port: int, dice: random.Random) -> None:
    """One client that disconnects at a random time: before the first byte, mid-stream, or while it is queued."""
    prompt = "long " * 400 if dice.random() < 0.3 else f"short {dice.random()}"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(body(prompt, 400, stream=dice.random() < 0.7))
        client.settimeout(dice.uniform(0.0, 0.6) + 0.001)
        try:
            while client.recv(4096):
                if dice.random() < 0.05:
                    break
        except TimeoutError:
            pass
        if dice.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # an RST instead of a FIN


def idle(agents: Sequence[Agent]) -> bool:
    """Whether nothing is in flight anywhere."""
    for agent in agents:
        status = agent.status()
        if status["in_flight"] or any(m["in_flight"] or m["waiting"] for m in status["models"]):
            return False
    return True


def generated(agents: Sequence[Agent]) -> float:
    """Tokens that the engines have produced."""
    total = 0.0
    for agent in agents:
        text = agent.get("/metrics").body.decode()
        total += sum(float(n) for n in re.findall(r"^mlxrack_engine_decode_tokens_total\S* (\S+)", text, re.MULTILINE))
    return total


@pytest.mark.timeout(900)
def test_a_disconnect_cancels_generation_through_two_hops(tmp_path: Path) -> None:
    worker = model(rows=4, fake_step_s=0.02, fake_prefill_tps=800)
    with rack(tmp_path, [], [worker], [worker]) as (door, *workers):
        dice = random.Random(9)
        slowest = 0.0
        for _ in range(0, LEAVERS, BATCH):
            threads = [
                threading.Thread(target=leave, args=(door.port, random.Random(dice.random()))) for _ in range(BATCH)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            left = time.monotonic()
            until(lambda: idle([door, *workers]), "everything is given up", 3.0)
            slowest = max(slowest, time.monotonic() - left)
            before = generated(workers)
            time.sleep(0.1)
            assert generated(workers) == before, "no engine works for nobody"
        print(f"{LEAVERS} clients left; the slowest of {LEAVERS // BATCH} groups was forgotten after {slowest:.3f} s")
        assert slowest < STOPS_S + 0.1, "0.1 s is what asking three agents takes"
        assert not [one.fault for one in at_once(door.port, [Ask("and now", 5)] * 4) if one.fault]
        assert door.status()["breakers"] == []


def read_slowly(port: int, number: int, stop: threading.Event) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(body(f"tell {number}", 4000, stream=True))
        while not stop.is_set():
            client.recv(256)
            stop.wait(0.25)


@pytest.mark.timeout(900)
def test_slow_readers_cost_little_memory(tmp_path: Path) -> None:
    """Fifty clients that read a kilobyte per second of answers that are produced at once."""
    worker = model(rows=64, fake_step_s=0.002)
    extra = "[limits]\nin_flight_per_key = 64\n"
    with rack(tmp_path, [], [worker], [worker], extra=extra) as agents:
        door, *workers = agents
        at_once(door.port, [Ask(f"warm {n}", 50) for n in range(40)])
        pids = {agent.node: agent.process.pid for agent in agents if agent.process is not None}
        before = {node: psutil.Process(pid).memory_info().rss for node, pid in pids.items()}
        stop = threading.Event()
        threads = [threading.Thread(target=read_slowly, args=(door.port, n, stop)) for n in range(SLOW)]
        for thread in threads:
            thread.start()
        growth = dict.fromkeys(pids, 0)
        for _ in range(20 if LEAVERS > 100 else 8):
            time.sleep(1.0)
            for node, pid in pids.items():
                growth[node] = max(growth[node], psutil.Process(pid).memory_info().rss - before[node])
        made = generated(workers)
        stop.set()
        for thread in threads:
            thread.join()
        shown = ", ".join(f"{node} {size / 1e6:.1f} MB" for node, size in growth.items())
        print(f"{SLOW} readers of 1 KB/s, {made:.0f} tokens made meanwhile; memory grew by {shown}")
        assert made > (100_000 if LEAVERS > 100 else 40_000), "the engines were not held up"
        assert max(growth.values()) < 50e6
        until(lambda: idle(agents), "all are gone", 10.0)
