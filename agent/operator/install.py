"""The macOS service's property list, rendered from the template in launchd/, and the one that is installed. What
installing takes is in agent/operator/service."""

import plistlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import escape

from agent.config import AgentConfig
from agent.operator.service import launchd, output, plan
from shared.errors import Refused
from shared.resources import resource

DAEMON_PLIST = Path(launchd.PLIST)
NEWSYSLOG = Path(plan.NEWSYSLOG)
_BROKEN = (plistlib.InvalidFileException, ExpatError, ValueError, OverflowError, TypeError)


def render_plist(
    config: AgentConfig,
    *,
    program: Path,
    config_path: Path,
    user: str,
    home: Path,
    logs: Path,
    environ: Mapping[str, str] | None = None,
) -> str:
    """The LaunchDaemon; ``environ`` are variables beside HOME and PATH. Raises Refused when the result is not a valid
    property list."""
    values = {
        "label": launchd.LABEL,
        "program": str(program),
        "config": str(config_path),
        "user": user,
        "home": str(home),
        "stdout": str(logs / output.NAME),
        "exit_timeout": str(int(config.limits.drain_s) + plan.STOP_MARGIN_S),
    }
    template = Template(resource("launchd/dev.mlxrack.agent.plist.in").read_text(encoding="utf-8"))
    try:
        text = template.substitute({name: escape(value) for name, value in values.items()})
        tree = plistlib.loads(text.encode())
    except _BROKEN as error:
        raise Refused(f"render plist: {error}") from None
    if environ:
        tree["EnvironmentVariables"] = {**environ, **tree["EnvironmentVariables"]}
        text = plistlib.dumps(tree, sort_keys=False).decode()
    return text


def program_path() -> Path:
    """Absolute path of the script of this very environment, whatever else a PATH finds: launchd expands nothing."""
    own = Path(sys.executable).absolute().parent / "mlxrack-agent"
    return own if own.exists() else Path(shutil.which(own.name) or own).resolve()


def installed() -> dict[str, Any] | None:
    """The property list of the installed service; None where none is installed."""
    try:
        return parsed(DAEMON_PLIST.read_bytes())
    except OSError:
        return None


def parsed(text: bytes) -> dict[str, Any] | None:
    """A property list; None where it is none."""
    try:
        found = plistlib.loads(text)
    except _BROKEN:
        return None
    return found if isinstance(found, dict) else None
