"""The aggregator as a program of its own: a child process in which the clock shows another time."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTHING = 66
LIMIT_S = 600
_CHILD = """\
import sys, time
now_ns = int(sys.argv[1]) * 1_000_000
time.time_ns = lambda: now_ns
from aggregator import cli
for line in sys.argv[2:]:
    code = cli.main(line.split("\\x1f"))
    if code not in (0, 66):
        sys.exit(code)
"""


class Failed(Exception):
    """The aggregator ended otherwise than with its reports."""


def run(config: Path, now_ms: int, weeks: Iterable[str], months: Iterable[str]) -> None:
    """Roll up, and publish the reports of these periods. Raises Failed with what it said."""
    verbs = [["rollup"], *(["weekly", "--week", w] for w in weeks), *(["monthly", "--month", m] for m in months)]
    lines = ["\x1f".join([verb[0], "--config", str(config), "--quiet", *verb[1:]]) for verb in verbs]
    _child(config, now_ms, lines)


def show(config: Path, now_ms: int, *args: str) -> str:
    """What `show` prints."""
    return _child(config, now_ms, ["\x1f".join(["show", "--config", str(config.resolve()), *args])])


def _child(config: Path, now_ms: int, lines: list[str]) -> str:
    command = [sys.executable, "-c", _CHILD, str(now_ms), *lines]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=env, cwd=config.parent, check=False
    )
    if done.returncode:
        raise Failed(f"{config.parent.name}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
