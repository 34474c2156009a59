"""Sleep, power losses, energy mode and FileVault: what `pmset` and `fdesetup` print, and what to set. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from agent.operator.checks import Finding

Settings = Mapping[str, Mapping[str, str]]
"""By power source ("AC Power", "UPS Power"), or by what `pmset -g` calls its parts: settings and their values."""
_LINE = re.compile(r"(?P<name>\S.*?)\s+(?P<value>-?\d+|/\S+)\*?(?:\s+\((?P<note>.*)\))?")
_HEAD = re.compile(r"(?P<name>[^:]+?)\s*:")
_MOST_CHARS = 300
"""Of a line; `pmset` prints no longer one, and what somebody put into an archive must not take hours."""
_NO_MAINS = ("battery power", "active profiles")
_LOW = "1"
_MODES = {"0": "automatic", "1": "low power", "2": "high power"}


class Wanted(NamedTuple):
    """A setting, the value that a server needs, and what happens without."""

    name: str
    value: str
    without: str


_AWAKE = (
    Wanted("sleep", "0", "it sleeps after {value} min without a reason to stay awake, and then serves nobody"),
    Wanted("disksleep", "0", "its disks stop after {value} min, and the next model waits for them"),
    Wanted("womp", "1", "if it sleeps nobody can wake it over the network"),
)
_AFTER = Wanted("autorestart", "1", "after a power loss it stays off until somebody presses its button")


def parse(text: str) -> Settings:
    """The output of `pmset -g` and `pmset -g custom`, of any version: sections with names and values. A line of
    another shape is left out."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in (one for one in text.splitlines() if len(one) <= _MOST_CHARS):
        if head := _HEAD.fullmatch(line.strip()):
            section = head["name"]
        elif setting := _LINE.fullmatch(line.strip()):
            found.setdefault(section, {})[setting["name"]] = setting["value"]
    return found


def preventing(text: str) -> list[str]:
    """The programs that keep the machine awake now, as `pmset -g` lists them, each once."""
    found = re.search(r"^\s*sleep\s+\d+\s+\(sleep prevented by (.*?)\)", text, re.MULTILINE)
    return list(dict.fromkeys(one for one in re.split(r",\s*", found[1]) if one)) if found else []


def judge(live: str, custom: str) -> Iterator[Finding]:
    """What `pmset -g` and `pmset -g custom` say of sleep, power losses and energy mode, with the command to run."""
    stored = [each for source, each in parse(custom).items() if source.lower() not in _NO_MAINS]
    system = parse(live)
    used = [each for part, each in system.items() if part.lower() not in _NO_MAINS]
    sources = stored if any("sleep" in each for each in stored) else used
    if not any("sleep" in each for each in sources):
        seen = "`pmset -g` does not say when this machine sleeps; look at System Settings, Energy"
        yield Finding("sleep", "warning", seen)
        return
    never = any(each.get("SleepDisabled") == "1" for each in system.values())
    yield _sleep(sources, preventing(live), never=never)
    yield _after_loss(sources)
    yield _mode(sources)


def _sleep(sources: Sequence[Mapping[str, str]], by: Sequence[str], *, never: bool) -> Finding:
    wrong = [one for one in _AWAKE if _values(sources, one) - {one.value}]
    if never and not any(one.name == "disksleep" for one in wrong):
        return Finding("sleep", "ok", "it never sleeps (SleepDisabled 1)")
    if not wrong:
        return Finding("sleep", "ok", "it never sleeps by itself (sleep 0), nor do its disks")
    said = [one.without.format(value=max(_values(sources, one) - {one.value}, key=len)) for one in wrong]
    if any(one.name == "sleep" for one in wrong):
        deep = "; it then also goes into standby" if "1" in _values(sources, Wanted("standby", "0", "")) else ""
        awake = f"; kept awake now by {', '.join(by)}" if by else ""
        said.append(f"the agent holds it awake while it runs, and nothing does before and after{deep}{awake}")
    return Finding("sleep", "warning", f"{'; '.join(said)}: {_command(wrong)}")


def _after_loss(sources: Sequence[Mapping[str, str]]) -> Finding:
    values = _values(sources, _AFTER)
    if not values:
        seen = "`pmset` lists no autorestart here; see `sudo systemsetup -getrestartpowerfailure`"
        return Finding("power loss", "warning", f"{seen}, or System Settings, Energy")
    if values == {_AFTER.value}:
        return Finding("power loss", "ok", "it starts again by itself (autorestart 1)")
    return Finding("power loss", "warning", f"{_AFTER.without}: {_command([_AFTER])}")


def _mode(sources: Sequence[Mapping[str, str]]) -> Finding:
    """Low power mode, under each of its names: a key of its own, or one value of powermode."""
    low = [name for name in ("lowpowermode", "powermode") if _LOW in _values(sources, Wanted(name, "0", ""))]
    if low:
        command = _command([Wanted(name, "0", "") for name in low])
        return Finding("energy mode", "warning", f"low power: chip and answers are slowed down for good: {command}")
    modes = _values(sources, Wanted("powermode", "0", ""))
    high = "1" in _values(sources, Wanted("highpowermode", "0", ""))
    names = sorted(_MODES.get(mode, mode) for mode in modes) or ["high power" if high else "not low power"]
    return Finding("energy mode", "ok", ", ".join(names))


def _values(sources: Sequence[Mapping[str, str]], one: Wanted) -> set[str]:
    return {each[one.name] for each in sources if one.name in each}


def _command(wanted: Sequence[Wanted]) -> str:
    return f"`sudo pmset -a {' '.join(f'{one.name} {one.value}' for one in wanted)}`"


def awake(assertions: str, held_by: int | None) -> Finding:
    """What `pmset -g assertions` says of sleep while the agent runs, whose own assertion the process ``held_by`` holds
    (None where no agent says that it holds one)."""
    assertions = "\n".join(line.strip()[:_MOST_CHARS] for line in assertions.splitlines())
    system = dict(re.findall(r"^(Prevent(?:UserIdle)?SystemSleep)[ \t]+(\d+)$", assertions, re.MULTILINE))
    held = re.findall(r"^pid (\d+)\((.{1,60}?)\): .*?\bPrevent(?:UserIdle)?SystemSleep\b", assertions, re.MULTILINE)
    by = ", ".join(dict.fromkeys(name for _, name in held)) or "nobody"
    if not system:
        return Finding("power assertions", "warning", "`pmset -g assertions` does not say what prevents sleep")
    if held_by is None:
        kept = "1" in system.values()
        seen = f"kept awake by {by}" if kept else "nothing keeps it awake now"
        return Finding("power assertions", "ok", f"{seen}; no running agent says that it does")
    if str(held_by) in {pid for pid, _ in held}:
        return Finding("power assertions", "ok", f"macOS lists the agent's caffeinate (kept awake by {by})")
    seen = f"the agent says that process {held_by} keeps it awake, and macOS does not list it (kept awake by {by})"
    return Finding("power assertions", "warning", seen)


def filevault(status: str, *, restarts: str = "") -> Finding:
    """What `fdesetup status` says; ``restarts`` is what `fdesetup supportsauthrestart` says."""
    said = status.lower()
    if re.search(r"cryption (?:in progress|paused)", said):
        working = "decrypted" if "decryption" in said else "encrypted"
        return Finding("FileVault", "warning", f"the disk is being {working}; look again when that is done")
    if "filevault is on" in said:
        planned = "; for a planned restart: `sudo fdesetup authrestart`" if "true" in restarts.lower() else ""
        seen = "on: after a power loss no service starts until somebody types a password on this machine"
        other = "(from macOS 26 on also over ssh, with Remote Login on), or `sudo fdesetup disable` in a locked room"
        return Finding("FileVault", "warning", f"{seen} {other}{planned}")
    if "filevault is off" in said:
        when = "login of a user (deferred)" if "deferred" in said else "restart" if "restart" in said else ""
        deferred = f"; it turns on at the next {when}" if when else ""
        return Finding("FileVault", "warning" if deferred else "ok", f"off: it starts without a password{deferred}")
    return Finding("FileVault", "warning", "`fdesetup status` does not say whether it is on; look in System Settings")
