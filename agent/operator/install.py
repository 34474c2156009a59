"""Install the agent as a macOS service: a LaunchDaemon and a newsyslog line, rendered from templates in launchd/."""

import plistlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any
from xml.sax.saxutils import escape

from agent.config import AgentConfig
from shared.errors import Halt, Refused
from shared.resources import resource

LABEL = "dev.mlxrack.agent"
DAEMON_PLIST = Path("/Library/LaunchDaemons") / f"{LABEL}.plist"
NEWSYSLOG = Path("/etc/newsyslog.d/dev.mlxrack.conf")
STOP_MARGIN_S = 30
"""Time that launchd allows beyond the drain: for ending loaders, the last window and the last push."""


def render_plist(config: AgentConfig, *, program: Path, config_path: Path, user: str, home: Path, logs: Path) -> str:
    """The LaunchDaemon. Raises Refused when the result is not a valid property list."""
    text = _filled(
        "dev.mlxrack.agent.plist.in",
        {
            "label": LABEL,
            "program": str(program),
            "config": str(config_path),
            "user": user,
            "home": str(home),
            "stdout": str(logs / "agent.stdout.log"),
            "exit_timeout": str(int(config.limits.drain_s) + STOP_MARGIN_S),
        },
    )
    try:
        plistlib.loads(text.encode())
    except (plistlib.InvalidFileException, ValueError) as error:
        raise Refused(f"render plist: {error}") from None
    return text


def render_newsyslog(*, user: str, logs: Path) -> str:
    """The line that rotates launchd's output file; the agent rotates its structured log itself."""
    return _filled("dev.mlxrack.newsyslog.conf.in", {"stdout": str(logs / "agent.stdout.log"), "user": user}, xml=False)


def program_path() -> Path:
    """Absolute path of the installed script: launchd expands nothing."""
    return Path(shutil.which("mlxrack-agent") or str(Path(sys.executable).parent / "mlxrack-agent")).resolve()


def install(plist: str, newsyslog: str, *, user: str, folders: Sequence[Path]) -> None:
    """Create the folders, write both files and start the daemon. Raises Halt with a remedy when a step fails."""
    if sys.platform != "darwin":
        raise Halt("install: launchd exists on macOS only; --dry-run shows what would be installed")
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.chown(folder, user)
        DAEMON_PLIST.write_text(plist)
        DAEMON_PLIST.chmod(0o644)
        NEWSYSLOG.write_text(newsyslog)
        NEWSYSLOG.chmod(0o644)
    except LookupError:
        raise Halt(f"install: user {user} does not exist; create it (no login), or set another with --user") from None
    except PermissionError:
        raise Halt(f"install: cannot write {DAEMON_PLIST}; run the command with sudo") from None
    for argv in (
        ["/usr/bin/plutil", "-lint", str(DAEMON_PLIST)],
        ["/bin/launchctl", "bootstrap", "system", str(DAEMON_PLIST)],
        ["/bin/launchctl", "kickstart", "-k", f"system/{LABEL}"],
    ):
        run = subprocess.run(argv, capture_output=True, text=True, check=False)
        already = argv[1] == "bootstrap" and "already" in run.stderr.lower()
        if run.returncode != 0 and not already:
            raise Halt(f"install: {' '.join(argv)}: {(run.stderr or run.stdout).strip()}")


def installed() -> dict[str, Any] | None:
    """The property list of the installed service; None where none is installed."""
    try:
        found = plistlib.loads(DAEMON_PLIST.read_bytes())
    except (OSError, ValueError, plistlib.InvalidFileException):
        return None
    return found if isinstance(found, dict) else None


def _filled(name: str, values: dict[str, str], *, xml: bool = True) -> str:
    template = Template(resource(f"launchd/{name}").read_text(encoding="utf-8"))
    return template.substitute({k: escape(v) for k, v in values.items()} if xml else values)
