"""launchd's service of the agent: its names, what `launchctl` answers, and the steps to stop and start it. Pure.

What `launchctl` answers is as reported in public: a label lingers for about five seconds after `bootout`, and
`bootstrap` then ends with 5 "Input/output error" (headroomlabs-ai/headroom issue 1289, macOS 26.5; NousResearch/
hermes-agent pull request 42914; openclaw/openclaw issue 136453); an unknown service is 3 "No such process" for
`bootout` and 113 for `print`; `bootout` ends with 36 while the service still stops (osquery/osquery issue 5698), whose
state then is "SIGTERMed" and not "running" (kxn/codex-remote-feishu issue 914); there is no `--wait`
(nix-community/home-manager issue 9585). A service that was disabled is refused with 119.
"""

import re
from collections.abc import Sequence

from agent.operator.service.steps import Command, Gone, Runs, Step, command

LABEL = "dev.mlxrack.agent"
TARGET = f"system/{LABEL}"
PLIST = f"/Library/LaunchDaemons/{LABEL}.plist"
NEW_PLIST = f"{PLIST}.new"
"""Not read by launchd, whose files end with .plist."""
LAUNCHCTL = "/bin/launchctl"
PRINT = (LAUNCHCTL, "print", TARGET)
UNKNOWN = 113
"""The status of `launchctl print` for a service that launchd does not know."""
START_S = 15.0
_ABSENT, _STOPPING = (3, UNKNOWN), (5, 36, 37)
_LINGERS = (5, 17, 37)


def stop(limit_s: float) -> list[Step]:
    """The service ends as it likes within ``limit_s``, and its label is free afterwards."""
    return [Command((LAUNCHCTL, "bootout", TARGET), fine=(*_ABSENT, *_STOPPING)), Gone(limit_s)]


def start() -> list[Step]:
    """launchd takes the property list, enabled, and starts it."""
    return [
        command(LAUNCHCTL, "enable", TARGET),
        Command((LAUNCHCTL, "bootstrap", "system", PLIST), again=_LINGERS, why=_why_not_taken()),
        Command((LAUNCHCTL, "kickstart", TARGET), fine=(37,)),
        Runs(START_S),
    ]


def state(printed: str) -> str:
    """The state of a service in `launchctl print`, like ``running``, ``SIGTERMed`` or ``spawn scheduled``; "" where
    none is said."""
    found = re.search(r"^\s*state = (.+?)\s*$", printed, re.MULTILINE)
    return found[1] if found else ""


def arguments(printed: str) -> tuple[str, ...] | None:
    """The command of a service in `launchctl print`; None where none is said."""
    found = re.search(r"^\s*arguments = \{\n(.*?)^\s*\}", printed, re.MULTILINE | re.DOTALL)
    return tuple(line.strip() for line in found[1].splitlines()) if found else None


def holds(printed: str, wanted: Sequence[str]) -> bool:
    """Whether the service that launchd holds has this command: the property list on disk may be a newer one."""
    known = arguments(printed)
    return known is None or known == tuple(wanted)


def _why_not_taken() -> str:
    return "launchd does not take it; `log show --last 2m --predicate 'process == \"launchd\"'` says why"
