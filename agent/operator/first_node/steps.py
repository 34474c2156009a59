"""What is asked of a first node: each step is a program, how long it may take, and what of its output is
kept."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from agent.operator.mac import network
from agent.operator.mac.settings import QUESTIONS
from agent.operator.service.launchd import LABEL
from agent.telemetry.sensors.powermetrics import ARGV as POWERMETRICS
from agent.telemetry.sensors.thermal import NOTIFY_KEY

PYTHON = (sys.executable, "-P", "-m")
TEXT_SYSCTLS = ("vm.swapusage", "kern.memorystatus_vm_pressure_level", "iogpu.wired_limit_mb", "hw.memsize", "hw.model")
_PROFILE = re.compile(r"Model Name|Model Identifier|Chip|Total Number of Cores|Memory|System Firmware|OS Loader")
_LAUNCHD = re.compile(
    r"\s*(state|runs|last exit code|last terminating signal|exit timeout|minimum runtime|spawn type|type|forks|execs|"
    r"active count|successive crashes|immediate reason|jetsam[^=]*|properties) = "
)
_GPU = re.compile(r'.*"(PerformanceStatistics|IOClass|model|gpu-core-count|MetalPluginName)" = ')


def _rules(text: str) -> str:
    """Of the firewall's rules those for a Python: which other programs somebody has is nobody's business."""
    wanted = [one for one in network.apps(text) if re.search("python|mlxrack", one.path, re.IGNORECASE)]
    lines = [f"{one.path}\n({'Allow' if one.allowed else 'Block'} incoming connections)\n" for one in wanted]
    return "".join(f"{n} : {line}" for n, line in enumerate(lines, 1))


def _assertions(text: str) -> str:
    """Totals, and who holds what; not what a program says that it is for."""
    lines = (line.split(" named:")[0] for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if re.match(r"\s*(?:\w{3,40}\s+\d+\s*$|pid \d+\()", line))


_KEPT: Mapping[str, Callable[[str], str]] = {
    "filevault": lambda text: re.sub(r"(?i)(user )\S.*", r"\1(name)", text),
    "firewall-apps": _rules,
}


class Step(NamedTuple):
    """``mac``: only there. ``root``: only by root. ``optional``: a program that need not be installed. ``keep`` takes
    from the output what is kept."""

    name: str
    argv: tuple[str, ...]
    limit_s: float = 10.0
    mac: bool = True
    root: bool = False
    optional: bool = False
    keep: Callable[[str], str] = str


def steps(config: str, state: str, drain_s: float) -> list[Step]:
    """Every step in its order. ``config`` is the configuration's path, "" where there is none."""
    named = ("--config", config) if config else ()
    return [
        Step("versions", _reader("versions"), 30, mac=False),
        Step("sw-vers", ("sw_vers",)),
        Step("hardware", ("system_profiler", "SPHardwareDataType"), 30, keep=_lines(_PROFILE)),
        Step("sysctls", _reader("sysctls"), 20),
        Step("sysctl-text", ("sysctl", "-i", *TEXT_SYSCTLS)),
        Step("host-statistics", _reader("host-statistics"), 20),
        Step("vm-stat", ("vm_stat",)),
        Step("memory-pressure", ("memory_pressure", "-Q")),
        Step("notify", _reader("notify"), 20),
        Step("notifyutil", ("notifyutil", "-g", NOTIFY_KEY), keep=_lines(re.compile(re.escape(NOTIFY_KEY)))),
        Step("smc", _reader("smc"), 40),
        Step("energy", _reader("energy"), 40),
        Step("powermetrics", _powermetrics(), 30, root=True),
        Step(
            "macmon", ("macmon", "pipe", "-s", "3", "-i", "1000"), 20, optional=True, keep=_lines(re.compile(r"\s*\{"))
        ),
        Step("ioreg", ("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator"), keep=_lines(_GPU)),
        Step("sensors", _reader("sensors"), 60, mac=False),
        Step("service", _reader("service", str(drain_s)), 20),
        Step("launchd", ("launchctl", "print", f"system/{LABEL}"), keep=_lines(_LAUNCHD)),
        *(Step(name, argv, keep=_KEPT.get(name, str)) for name, argv in QUESTIONS.items()),
        Step("pmset-assertions", ("pmset", "-g", "assertions"), keep=_assertions),
        Step("device", (*PYTHON, "agent.loader", "--device"), 60, mac=False),
        Step("answers", (*PYTHON, "agent.loader", "--answers"), 120, mac=False),
        Step("status", (*PYTHON, "agent", "status", "--json", *named), 30, mac=False, keep=_numbers),
        Step("plan", _reader("plan", config, state), 180, mac=False),
        Step("doctor", (*PYTHON, "agent", "doctor", "--json", *named), 180, mac=False),
    ]


def _reader(*arguments: str) -> tuple[str, ...]:
    return (*PYTHON, "agent.operator.first_node.readers", *arguments)


def _powermetrics() -> tuple[str, ...]:
    """As the agent runs it, but three intervals of a second."""
    instead = {"-i": "1000", "-n": "3"}
    argv = list(POWERMETRICS)
    for option, value in instead.items():
        argv[argv.index(option) + 1] = value
    return ("powermetrics", *argv[1:])


def _lines(wanted: re.Pattern[str]) -> Callable[[str], str]:
    """Only lines that begin so; what they are about is known, so nothing else comes along."""
    return lambda text: "".join(
        line for line in text.splitlines(keepends=True) if wanted.match(line.lstrip(" \t")) or wanted.match(line)
    )


def _numbers(text: str) -> str:
    """Of the running agent's status what judges memory: numbers of its models, and where the budget is from."""
    try:
        told: Any = json.loads(text)
    except ValueError:
        return ""
    wanted: Sequence[str] = ("plan_error_ppm", "need_bytes", "footprint_bytes", "peak_bytes", "load_s", "restarts")
    models = [{name: one.get(name) for name in wanted} for one in told.get("models", ())]
    return json.dumps({**{name: told.get(name) for name in ("budget_from", "budget_bytes", "awake")}, "models": models})
