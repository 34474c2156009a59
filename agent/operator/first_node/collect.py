"""Takes the steps of a first node, each in a process that is ended at its limit, and masks what they print."""

import contextlib
import getpass
import os
import pwd
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from agent.config import AgentConfig, configured_peers
from agent.operator.first_node import machine
from agent.operator.first_node.bundle import MOST_TEXT_BYTES, Bundle, Taken, shortened
from agent.operator.first_node.masking import Mask, masked_json
from agent.operator.first_node.steps import Step
from agent.operator.mac import network, readings
from shared import __version__
from shared.hosts import host_of

WHOLE_S = 420.0
"""All steps together; what is left is not taken."""
MOST_OUTPUT_BYTES = MOST_TEXT_BYTES
MOST_ERROR_CHARS = 600
SYSTEM_FOLDERS = "/usr/bin:/bin:/usr/sbin:/sbin:/opt/homebrew/bin:/usr/local/bin:" + network.FIREWALL_FOLDER
REAP_S = 2.0
_SERIAL = re.compile(r'"IOPlatform(?:SerialNumber|UUID)" = "([^"]{6,})"')
Progress = Callable[[str], None]


def collect(taking: Sequence[Step], mask: Mask, progress: Progress, limit_s: float = WHOLE_S) -> Bundle:
    """Take every step that this machine can. Never raises for what a step does."""
    taken: dict[str, Taken] = {}
    until = time.monotonic() + limit_s
    for n, step in enumerate(taking, 1):
        why = _why_not(step, taken) or (
            "" if time.monotonic() < until else f"all steps together may take {limit_s:g} s"
        )
        taken[step.name] = Taken(skipped=why) if why else take(step, mask, min(step.limit_s, until - time.monotonic()))
        one = taken[step.name]
        ended = (
            f"skipped: {one.skipped}"
            if one.skipped
            else f"{one.seconds:.1f} s" + (f"; {one.error}" if one.error else "")
        )
        progress(f"[{n:2}/{len(taking)}] {step.name}: {ended}")
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Bundle(made, __version__, machine.PLATFORM, taken)


def take(step: Step, mask: Mask, limit_s: float) -> Taken:
    """One step's masked output, or why there is none."""
    began = time.monotonic()
    said, error = _run(step.name if step.argv[0] == sys.executable else step.argv[0], step.argv, limit_s)
    seconds = time.monotonic() - began
    try:
        text = step.keep(said.decode("utf-8", "replace").replace("\0", "\n"))
    except Exception as unlike:  # noqa: BLE001  # another shape than any version of the program has
        text, error = "", error or f"{step.name}: unexpected output ({type(unlike).__name__})"
    kept = shortened(masked_json(text, mask)) if text else ""
    # before it is cut: half a secret has no form
    return Taken(kept, round(seconds, 3), mask(error)[-MOST_ERROR_CHARS:])


def names(config: AgentConfig) -> Mapping[str, set[str]]:
    """What this machine and those who use it are called."""
    hosts = {socket.gethostname(), socket.gethostname().split(".")[0], config.node.id, config.node.rack}
    for node, url in configured_peers(config):
        hosts |= {node, host_of(url)}
    hosts |= {host_of(config.store.endpoint) if config.store.endpoint else "", config.store.bucket}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")} | {Path.home().name}
    with contextlib.suppress(OSError, KeyError):
        users |= {getpass.getuser(), pwd.getpwuid(os.getuid()).pw_gecos.split(",")[0]}
    serials = set[str]()
    if machine.is_mac():
        hosts |= {readings.said("scutil", "--get", name).strip() for name in ("ComputerName", "LocalHostName")}
        serials |= set(_SERIAL.findall(readings.said("ioreg", "-r", "-d", "1", "-c", "IOPlatformExpertDevice")))
    found = {"host": hosts, "user": users, "serial": serials}
    return {kind: {one for one in names if len(one) > 1} for kind, names in found.items()}


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, so that no program and no half file is left."""

    def end(_: int, __: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why_not(step: Step, taken: Mapping[str, Taken]) -> str:
    if step.mac and not machine.is_mac():
        return "this is not a Mac"
    if step.root and os.geteuid() != 0:
        return "needs root (run the command with sudo)"
    if step.optional and _program(step.argv[0]) is None:
        return "not installed"
    if step.name == "plan" and not step.argv[-2]:
        return "no configuration"
    if step.name == "plan" and not taken["status"].error:
        return "the running agent's status says it"
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}")


def _run(name: str, argv: Sequence[str], limit_s: float) -> tuple[bytes, str]:
    """A program's output so far, and why it is not whole; its whole process group is ended."""
    if (program := _program(argv[0])) is None:
        return b"", f"{name}: not found"
    try:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=dict(os.environ) if argv[0] == sys.executable else {**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        return b"", f"{name}: {error.strerror or type(error).__name__}"
    ended = False
    try:
        said, complaint, why = _heard(process, time.monotonic() + limit_s)
        ended = not why
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel cannot be ended
            process.wait(REAP_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    if why:
        return said, f"{name}: {why}"
    last = complaint.decode("utf-8", "replace").strip()
    # doctor exits 1 when it found something, and says it in its output
    if process.returncode and not (said and process.returncode == 1 and not last):
        return said, f"{name}: exit {process.returncode}{': ' if last else ''}{last}"
    return said, ""


def _heard(process: "subprocess.Popen[bytes]", until: float) -> tuple[bytes, bytes, str]:
    """Both outputs, and why they are not whole."""
    heard = {"out": b"", "err": b""}
    with selectors.DefaultSelector() as waiting:
        for name, stream in (("out", process.stdout), ("err", process.stderr)):
            assert stream is not None
            waiting.register(stream, selectors.EVENT_READ, name)
        while waiting.get_map():
            ready = waiting.select(max(0.0, until - time.monotonic()))
            if not ready or time.monotonic() >= until:
                return heard["out"], heard["err"], "did not end within its time and was ended"
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    waiting.unregister(key.fileobj)
                heard[key.data] = heard[key.data] + piece
            if len(heard["out"]) > MOST_OUTPUT_BYTES or len(heard["err"]) > MOST_OUTPUT_BYTES:
                return (
                    heard["out"][:MOST_OUTPUT_BYTES],
                    b"",
                    f"printed more than {MOST_OUTPUT_BYTES >> 10} KiB and was ended",
                )
    try:
        process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return heard["out"], heard["err"], "did not end within its time and was ended"
    return heard["out"], heard["err"], ""
