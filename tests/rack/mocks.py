"""Mock workers behind a real gateway, in a separate thread."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from scripts.mock_worker import MockWorker
from scripts.seaweed import free_port
from tests.rack.harness import SECRET, Agent, until, write_config


class Named:
    """A node as a configuration names it."""

    def __init__(self, node: str, port: int) -> None:
        self.node, self.port = node, port


@contextlib.contextmanager
def door_with_mocks(
    folder: Path, *nodes: str, words: int = 16, gap_s: float = 0.01, extra: str = "", wait: bool = True
) -> Iterator[tuple[Agent, list[MockWorker]]]:
    """A gateway without models of its own, whose peers are mock workers of these names."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    workers = [MockWorker(node, "r", SECRET, words=words, gap_s=gap_s) for node in nodes]
    for worker in workers:
        asyncio.run_coroutine_threadsafe(worker.start(), loop).result(10)
    door = Agent(folder, "door", free_port())
    write_config(door, [Named(w.node, w.port) for w in workers], [], extra)  # type: ignore[misc]
    try:
        door.start()
        if wait:
            until(lambda: all(p["state"] == "up" for p in door.status()["peers"]), "the workers are known")
        yield door, workers
    finally:
        if door.process is not None and door.process.poll() is None:
            door.kill()
        for worker in workers:
            asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
