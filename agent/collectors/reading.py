"""What a collector is, and how a source is read without being trusted."""

import subprocess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

COMMAND_TIMEOUT_S = 5.0


class Reading(NamedTuple):
    """Fields of records.HostSample that were read, and each source that failed with its reason."""

    fields: dict[str, Any]
    failed: dict[str, str]


class Collector(Protocol):
    """One thing to read. ``read`` blocks at most a few seconds and never raises for a source's sake."""

    name: str

    def read(self) -> Reading:
        """Read every source now. ``fields`` holds only what was really read."""
        ...


def file_text(path: Path) -> str | None:
    """A small system file, None when there is none."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def command_text(*argv: str) -> str | None:
    """What a system command prints, None when it is missing, fails or takes too long."""
    try:
        run = subprocess.run(argv, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.decode("utf-8", errors="replace") if run.returncode == 0 else None
