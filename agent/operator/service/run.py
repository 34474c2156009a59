"""Takes the steps of an installation or a removal on this Mac, and looks at what is there before."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.operator.service import launchd
from agent.operator.service.plan import DSCL, FIREWALL, Account, Plan
from agent.operator.service.shell import shown
from agent.operator.service.steps import RETRY_S, Command, Gone, Step, Write
from shared.errors import Halt, RackError

ASK_S = 60.0
"""How long one command may take."""
_POLL_S = 0.5
_NOT_THERE = 127
Say = Callable[[str], None]


class Answer(NamedTuple):
    """What a program ended with and printed."""

    status: int
    output: str


def ask(argv: Sequence[str]) -> Answer:
    """Run a program with the folders' usual modes: what is made on the way belongs to everybody's paths."""
    try:
        run = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_S,
            check=False,
            umask=0o022,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return Answer(_NOT_THERE, f"{argv[0]}: no such program")
    except subprocess.TimeoutExpired:
        return Answer(124, f"no answer in {ASK_S:g} s")
    return Answer(run.returncode, (run.stdout + run.stderr).decode(errors="replace"))


class System(NamedTuple):
    """This machine. ``root`` is where its files begin; another one, like another ``ask``, is for tests."""

    mac: bool = sys.platform == "darwin"
    superuser: bool = os.geteuid() == 0
    root: Path = Path("/")
    ask: Callable[[Sequence[str]], Answer] = ask
    pause: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic

    def place(self, path: str) -> Path:
        """Where a file of the system is."""
        return self.root / path.lstrip("/")


class Runner:
    """Takes steps; ``say`` is told of optional ones that failed."""

    def __init__(self, system: System, verb: str, say: Say) -> None:
        self._system, self._verb, self._say = system, verb, say

    def run(self, steps: Iterable[Step]) -> None:
        """In their order. Raises Halt with the step that failed, what was seen and what to do."""
        for step in steps:
            if isinstance(step, Write):
                self._write(step)
            elif isinstance(step, Command):
                self._command(step)
            else:
                self._wait(step.limit_s, gone=isinstance(step, Gone))

    def _write(self, step: Write) -> None:
        path = self._system.place(step.path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(step.text, encoding="utf-8")
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError as error:
            raise Halt(f"{self._verb}: {step.path}: {error.strerror}; run the command with sudo") from None

    def _command(self, step: Command) -> None:
        ends = self._system.now() + RETRY_S
        while (answer := self._system.ask(step.argv)).status in step.again:
            if self._system.now() >= ends:
                break
            self._system.pause(_POLL_S)
        if answer.status in (0, *step.fine):
            return
        said = " ".join(answer.output.split()) or f"exit status {answer.status}"
        message = f"{self._verb}: `{shown(step)}`: {said}{f'; {step.why}' if step.why else ''}"
        if not step.optional:
            raise Halt(message)
        self._say(message)

    def _wait(self, limit_s: float, *, gone: bool) -> None:
        ends = self._system.now() + limit_s
        while not _reached(answer := self._system.ask(launchd.PRINT), gone=gone):
            if self._system.now() >= ends:
                seen = launchd.state(answer.output) or f"not known (exit status {answer.status})"
                wanted = "not gone" if gone else "not running"
                raise Halt(f"{self._verb}: after {limit_s:g} s {launchd.TARGET} is {wanted}: its state is {seen}")
            self._system.pause(_POLL_S)


def _reached(answer: Answer, *, gone: bool) -> bool:
    if gone:
        return answer.status == launchd.UNKNOWN
    return answer.status == 0 and launchd.state(answer.output) == "running"


def carry_out(plan: Plan, system: System, say: Say) -> None:
    """Install. Where that fails, the service that was there runs again, or the message says what state this Mac is in.
    Raises Halt."""
    may(system, "install")
    runner = Runner(system, "install", say)
    try:
        runner.run(plan.prepare)
    except (RackError, KeyboardInterrupt) as error:
        system.place(launchd.NEW_PLIST).unlink(missing_ok=True)
        raise Halt(f"{_text(error)}. Nothing of a service that runs here was changed") from None
    try:
        runner.run(plan.swap)
    except (RackError, KeyboardInterrupt) as error:
        raise Halt(f"{_text(error)}. {_undone(plan, runner, system)}") from None
    runner.run(plan.finish)


def _undone(plan: Plan, runner: Runner, system: System) -> str:
    """What has become of the former service."""
    try:
        runner.run(plan.undo)
    except RackError as error:
        there = system.place(launchd.PLIST).exists()
        how = f"sudo launchctl bootstrap system {launchd.PLIST}" if there else "sudo mlxrack-agent install"
        return f"The former service could not be started again ({error.message}): none runs now; try `{how}`"
    if not system.place(launchd.PLIST).exists():
        return "Nothing is installed"
    starts = any(isinstance(step, Command) and "bootstrap" in step.argv for step in plan.undo)
    return "The former service was restored and runs" if starts else "The former property list was restored"


def _text(error: BaseException) -> str:
    return error.message if isinstance(error, RackError) else "install: interrupted"


def may(system: System, verb: str) -> None:
    """Raises Halt, with what to do, where launchd's services cannot be changed: on another system, or not as root."""
    if not system.mac:
        raise Halt(f"{verb}: launchd exists on macOS only; --dry-run shows what would be done")
    if not system.superuser:
        raise Halt(f"{verb}: only root may do that; run the command with sudo")


# ---- what is there ----


def printed(system: System) -> str | None:
    """What launchd says of the service; None where it does not know it. Raises Halt where it cannot be asked."""
    answer = system.ask(launchd.PRINT)
    if answer.status in (launchd.UNKNOWN, _NOT_THERE):
        return None
    if answer.status != 0:
        raise Halt(f"launchctl print: {' '.join(answer.output.split()) or answer.status}; run the command with sudo")
    return answer.output


def account(system: System, user: str) -> Account | None:
    """The numbers of a user of this machine or its directory; None where there is none. Raises Halt."""
    text = _record(system, f"/Users/{user}", "UniqueID", "PrimaryGroupID")
    found = [re.search(rf"{name}: (-?\d+)", text) for name in ("UniqueID", "PrimaryGroupID")]
    return Account(int(found[0][1]), int(found[1][1])) if found[0] and found[1] else None


def group(system: System, name: str) -> int | None:
    """The number of a group. Raises Halt."""
    found = re.search(r"PrimaryGroupID: (-?\d+)", _record(system, f"/Groups/{name}", "PrimaryGroupID"))
    return int(found[1]) if found else None


def _record(system: System, record: str, *attributes: str) -> str:
    answer = system.ask((DSCL, "/Search", "-read", record, *attributes))
    if answer.status == 0 or answer.status == _NOT_THERE or "eDSRecordNotFound" in answer.output:
        return answer.output if answer.status == 0 else ""
    raise Halt(f"dscl: {record}: {' '.join(answer.output.split())}; is this machine's directory reachable?")


def taken(system: System) -> frozenset[int]:
    """Every number of a user or group."""
    lists = (("/Users", "UniqueID"), ("/Groups", "PrimaryGroupID"))
    texts = [system.ask((DSCL, "/Search", "-list", *one)).output for one in lists]
    return frozenset(int(one) for text in texts for one in re.findall(r"\s(-?\d+)$", text, re.MULTILINE))


def let_in(system: System, programs: Iterable[str]) -> frozenset[str]:
    """Those that the firewall allows by a rule."""
    said = {program: system.ask((FIREWALL, "--getappblocked", program)).output.lower() for program in programs}
    return frozenset(program for program, text in said.items() if "permitted" in text)


def ruled(system: System, programs: Iterable[str]) -> list[str]:
    """Those that the firewall has any rule for."""
    said = {program: system.ask((FIREWALL, "--getappblocked", program)).output.lower() for program in programs}
    return [program for program, text in said.items() if "permitted" in text or "blocked" in text]


def interpreters() -> list[str]:
    """The executables that macOS may know this Python by: a framework's bin/python becomes its Python.app."""
    executable = Path(os.path.realpath(sys.executable))
    application = Path(os.path.realpath(sys.base_prefix)) / "Resources/Python.app/Contents/MacOS/Python"
    return [str(one) for one in (executable, application) if one == executable or one.is_file()]
