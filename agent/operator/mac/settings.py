"""The settings of a Mac that `doctor` and a first node's archive judge: which programs tell them, and what they mean
together. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from agent.operator.checks import Finding
from agent.operator.mac import network, power

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "pmset": ("pmset", "-g"),
    "pmset-custom": ("pmset", "-g", "custom"),
    "filevault": ("fdesetup", "status"),
    "filevault-restart": ("fdesetup", "supportsauthrestart"),
    "firewall": ("socketfilterfw", "--getglobalstate"),
    "firewall-block": ("socketfilterfw", "--getblockall"),
    "firewall-apps": ("socketfilterfw", "--listapps"),
}
"""Programs of macOS with their arguments, by the name of the step."""


def judge(said: Mapping[str, str], programs: Sequence[str]) -> Iterator[Finding]:
    """Sleep, power loss, energy mode, FileVault and firewall. ``said`` has what was printed, "" where a program failed;
    what was not asked (an older archive) is not judged. ``programs`` as for ``network.firewall``."""
    if "pmset" in said:
        yield from power.judge(said["pmset"], said.get("pmset-custom", ""))
    if "filevault" in said:
        yield power.filevault(said["filevault"], restarts=said.get("filevault-restart", ""))
    if "firewall" in said:
        state, block_all, listed = (said.get(name, "") for name in ("firewall", "firewall-block", "firewall-apps"))
        yield network.firewall(state, block_all, listed, programs)
