"""A day of a whole agent in minutes: every poll of the sensors, every window and every push of 24 hours, without the
waits between them. Prints the resident bytes after each hour as a JSON list.

    python -m scripts.hurried_day --config agent.toml [--hours 24]

Configure a long ``sample_s`` and ``upload_s``: the agent's own jobs keep running beside this simulation.
"""

import asyncio
import json
import os
from pathlib import Path

import psutil

from agent.cli import state_folder
from agent.config import AgentConfig
from agent.config_checks import check
from agent.daemon import Daemon
from scripts.common import parser
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
    polls = int(WINDOW_S / loaded.telemetry.poll_s)
    for _ in range(hours):
        for _ in range(60):
            for number in range(1, polls + 1):
                await daemon.poll()
                if number % (polls // 4) == 0:
                    await daemon.telemetry.sampler.keep()
            await daemon.telemetry.sampler.tick()
            if not await daemon.telemetry.outbox.push():
                state = daemon.telemetry.pusher.state
                raise SystemExit(f"push failed: {state.reason or state.state}")
        found.append(process.memory_info().rss)
    daemon.stop()
    await running
    return found


def main() -> int:
    """The command line."""
    words = parser(__doc__)
    words.add_argument("--config", type=Path, required=True)
    words.add_argument("--hours", type=int, default=24)
    args = words.parse_args()
    print(json.dumps(asyncio.run(day(args.config, args.hours))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
