"""A day of a whole agent in minutes: every look at the sensors, every window and every push that 24 hours would have,
one after the other. Prints the resident bytes after each hour, as a JSON list.

    python -m scripts.hurried_day --config agent.toml [--hours 24]

The configuration's own ``sample_s`` and ``upload_s`` should be long: what is done here is done beside its jobs.
"""

import argparse
import asyncio
import json
import os
from pathlib import Path

import psutil

from agent.cli import state_folder
from agent.config import AgentConfig, check
from agent.daemon import Daemon
from shared import config as shared_config

WINDOW_S = 60


async def day(config: Path, hours: int) -> list[int]:
    """Resident bytes at the start and after each hour."""
    loaded = shared_config.load(config, AgentConfig, check)
    daemon = Daemon(loaded, state_folder(loaded), os.environ)
    listening = asyncio.Event()
    running = asyncio.create_task(daemon.run(lambda _: listening.set()))
    await asyncio.wait([running, asyncio.create_task(listening.wait())], return_when=asyncio.FIRST_COMPLETED)
    process = psutil.Process()
    found = [process.memory_info().rss]
    looks = int(WINDOW_S / loaded.telemetry.poll_s)
    for _ in range(hours):
        for _ in range(60):
            for look in range(1, looks + 1):
                await daemon.poll()
                if look % (looks // 4) == 0:
                    await daemon.telemetry.sampler.keep()
            await daemon.telemetry.sampler.tick()
            if not await daemon.telemetry.outbox.push():
                state = daemon.telemetry.pusher.state
                raise SystemExit(f"nothing was sent: {state.reason or state.state}")
        found.append(process.memory_info().rss)
    daemon.stop()
    await running
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--hours", type=int, default=24)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(day(args.config, args.hours))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
