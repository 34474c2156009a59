"""Whatever a peer with the right secret sends on its connection: no process ends, nothing is left behind."""

import json
import os
import random
from pathlib import Path

import aiohttp

from agent.mesh.signing import Key
from agent.wire.frames import Decoder
from shared.errors import Refused
from tests.rack.harness import SECRET, Agent, model, rack, until
from tests.rack.link_frames import frame
from tests.rack.test_links import signed

FRAMES = int(os.environ.get("MLXRACK_LINK_FRAMES", "100000" if os.environ.get("MLXRACK_ABUSE") == "1" else "2000"))
KEY = Key(SECRET)


async def _send(agent: Agent, rng: random.Random, most: int) -> int:
    """Frames on one connection, up to one that ends it; how many were sent."""
    url, decoder = f"http://127.0.0.1:{agent.port}/peer/v1/link", Decoder()
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=signed()) as socket:
        await socket.send_str(KEY.proof(str((await socket.receive()).data).partition(" ")[2], "n2"))
        for sent in range(1, most + 1):
            data = frame(rng)
            try:
                await socket.send_bytes(data)
                decoder.feed(data)
            except (ConnectionError, Refused):
                return sent
            if decoder._kept:  # what is still to come would be read as the rest of it
                return sent
    return most


async def test_no_frame_of_a_peer_ends_a_process(tmp_path: Path) -> None:
    rng = random.Random(FRAMES)
    with rack(tmp_path, [model(rows=8)], []) as (agent, second):
        second.kill()
        before = agent.status()["models"][0]
        sent = 0
        while sent < FRAMES:
            sent += await _send(agent, rng, min(100, FRAMES - sent))
        until(lambda: agent.status()["in_flight"] == 0, "nothing is left")
        until(lambda: agent.status()["models"][0]["in_flight"] == 0, "nor in the loader")
        after = agent.status()["models"][0]
        assert (after["pid"], after["restarts"]) == (before["pid"], 0)
        assert agent.alive()
        assert agent.chat().status == 200
        lines = [json.loads(line) for line in (agent.state / "logs/agent.jsonl").read_text().splitlines()]
        assert [line["event"] for line in lines if line["level"] == "error"] == []
        assert sum(line["event"] == "peer_request" for line in lines) > FRAMES // 20, "many were valid"
