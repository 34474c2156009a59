"""Stand-ins for ssh, scp, sudo and launchctl on the walk's machines.

They do what the documents use them for: a command or a file on another machine, a service that runs as its plist says.
As with launchd, a property list is read when the service is bootstrapped and not again.
"""

import os
import plistlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from scripts.walk.machines import Machine, load

LABEL = "dev.mlxrack.agent"
NOT_FOUND = 113
"""launchctl's status for a service that it does not know."""
_WITH_VALUE = ("-u", "-o", "-i", "-p", "-l")


class Service(msgspec.Struct):
    """A service that launchd holds: the plist as it was bootstrapped, and its process."""

    plist: str
    pid: int = 0


def main(argv: Sequence[str]) -> int:
    """Run the stand-in for ``argv[0]``; returns its exit status."""
    programs: dict[str, Callable[[Machine, list[str]], int]] = {
        "ssh": _ssh,
        "scp": _scp,
        "sudo": _sudo,
        "launchctl": _launchctl,
    }
    return programs[argv[0]](load()[os.environ["WALK_MACHINE"]], _operands(argv[1:]))


def kill(machine: Machine, number: int = signal.SIGKILL) -> None:
    """End a machine's service without a word, and what it started."""
    service = _service(machine)
    if service is None or not _lives(service.pid):
        return
    _signal(service.pid, number)
    _wait(service.pid, 60)


def _operands(words: Sequence[str]) -> list[str]:
    """Without the options before the first operand; an option among later words belongs to a command."""
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-k":
        rest = rest[2:] if rest[0] in _WITH_VALUE else rest[1:]
    return rest


# ---- other machines ----


def _named(host: str) -> Machine:
    machine = load().get(host.rpartition("@")[2].removesuffix(".local"))
    if machine is None or not machine.home.is_dir():
        raise SystemExit(f"ssh: Could not resolve hostname {host}: it is none of the walk's machines")
    return machine


def _ssh(_: Machine, words: list[str]) -> int:
    there = _named(words[0])
    return subprocess.run(
        ["/bin/sh", "-c", " ".join(words[1:])], cwd=there.home, env=there.environ(), check=False
    ).returncode


def _scp(_: Machine, words: list[str]) -> int:
    *sources, target = words
    for source in sources:
        file = _path(source)
        if not file.is_file():
            raise SystemExit(f"scp: {source}: No such file or directory")
        shutil.copy(file, _path(target))
    return 0


def _path(operand: str) -> Path:
    """Where HOST:PATH, or PATH on this machine, is."""
    host, _, name = operand.rpartition(":")
    return (_named(host).home if host else Path.cwd()) / name


# ---- services ----


def _sudo(machine: Machine, words: list[str]) -> int:
    if Path(words[0]).name == "mlxrack-agent" and "--dry-run" not in words:
        if "install" in words:
            return _install(machine, words)
        if "uninstall" in words:
            return _uninstall(machine, words)
    return subprocess.run(words, env=_own(machine), check=False).returncode


def _own(machine: Machine) -> dict[str, str]:
    """The environment of the terminal that called: this program itself needs another PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": machine.environ()["PYTHONPATH"]}


def _install(machine: Machine, words: list[str]) -> int:
    """As `mlxrack-agent install` on a Mac that this machine is not: its plist, which is taken if it has changed."""
    run = subprocess.run([*words, "--dry-run"], env=_own(machine), capture_output=True, text=True, check=False)
    sys.stderr.write(run.stderr)
    found = re.search(r"<\?xml.*?</plist>", run.stdout, re.DOTALL)
    if run.returncode or found is None:
        return run.returncode or 1
    service = _service(machine)
    if service is not None and service.plist == found[0] and _lives(service.pid):
        print(f"nothing to change: it runs as it should: {LABEL}")
        return 0
    if service is not None:
        _stop(service)
    _keep(machine, Service(found[0]))
    _kickstart(machine)
    print(f"installed and started {LABEL}")
    return 0


def _uninstall(machine: Machine, words: list[str]) -> int:
    """As `mlxrack-agent uninstall`: the service ends, and what the steps remove of this machine's own files goes."""
    service = _service(machine)
    if service is not None:
        _stop(service)
        machine.services.unlink()
    run = subprocess.run([*words, "--dry-run"], env=_own(machine), capture_output=True, text=True, check=False)
    sys.stderr.write(run.stderr)
    for line in run.stdout.splitlines():
        if (step := shlex.split(line, comments=True))[:1] in (["/bin/rm"], ["/bin/rmdir"]):
            if Path(step[-1] if step[-1] != "true" else step[1]).is_relative_to(machine.home):
                subprocess.run(["/bin/sh", "-c", line], check=False)
        elif line.startswith("# stays: "):
            print(line.removeprefix("# "))
    print(f"{LABEL} is not installed any more")
    return run.returncode


def _launchctl(machine: Machine, words: list[str]) -> int:
    verb, service = words[0], _service(machine)
    if service is None:
        print(f'Could not find service "{LABEL}" in domain for system', file=sys.stderr)
        return NOT_FOUND
    if verb == "kickstart":
        _kickstart(machine)
    elif verb == "bootout":
        _stop(service)
        machine.services.unlink()
    elif verb == "print":
        print(f"system/{LABEL} = {{\n\tstate = {'running' if _lives(service.pid) else 'not running'}\n}}")
    else:
        raise SystemExit(f"launchctl {verb}: the walk has no stand-in for it")
    return 0


def _kickstart(machine: Machine) -> None:
    """Start the service again, as its plist says."""
    service = _service(machine)
    assert service is not None
    _stop(service)
    wanted = plistlib.loads(service.plist.encode())
    folder, out = Path(wanted["WorkingDirectory"]), Path(wanted["StandardOutPath"])
    for one in (folder, out.parent):
        one.mkdir(parents=True, exist_ok=True, mode=0o700)
    # HOME is the service's; the rest of its environment is the machine's, whose names and hub are stand-ins
    environ = machine.environ() | {"HOME": wanted["EnvironmentVariables"]["HOME"]}
    with out.open("ab") as log:
        process = subprocess.Popen(
            wanted["ProgramArguments"],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _keep(machine, Service(service.plist, process.pid))


def _stop(service: Service) -> None:
    """SIGTERM, and SIGKILL after the plist's ExitTimeOut."""
    if not _lives(service.pid):
        return
    _signal(service.pid, signal.SIGTERM)
    if not _wait(service.pid, plistlib.loads(service.plist.encode())["ExitTimeOut"]):
        _signal(service.pid, signal.SIGKILL)
        _wait(service.pid, 30)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _lives(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody waited for does not."""
    try:
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while _lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _service(machine: Machine) -> Service | None:
    if not machine.services.is_file():
        return None
    return msgspec.json.decode(machine.services.read_bytes(), type=Service)


def _keep(machine: Machine, service: Service) -> None:
    machine.services.write_bytes(msgspec.json.encode(service))
