"""SIGHUP in a program of its own: before the configuration is read, while it runs, from a terminal and without one."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import cli

PROGRAM = """
import asyncio, signal, sys, time
from agent.operator.hangups import Hangups

hangups = Hangups()
print("taken", flush=True)
while sys.argv[1:] == ["late"] and not hangups._pending:
    time.sleep(0.01)

async def main():
    ended = asyncio.Event()
    hangups.listen(lambda: print("again", flush=True), lambda: (print("gone", flush=True), ended.set()))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("listens", flush=True)
    await asyncio.wait_for(ended.wait(), 120)

asyncio.run(main())
signal.raise_signal(signal.SIGHUP)
print("ended", flush=True)
"""


def started(*arguments: str, **more: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **more)  # type: ignore[call-overload,no-any-return]


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("times", [1, 50])
def test_one_that_comes_before_somebody_listens_is_delivered_then(times: int) -> None:
    with started("late") as process:
        assert said(process) == "taken"
        for _ in range(times):
            process.send_signal(signal.SIGHUP)
        assert said(process) == "again", "and once, however many came"
        assert said(process) == "listens"
        process.terminate()
        assert said(process) == "ended"
        assert process.wait(60) == 0


def test_each_reads_the_configuration_again_and_none_kills() -> None:
    with started() as process:
        assert [said(process), said(process)] == ["taken", "listens"]
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            assert said(process) == "again"
        process.terminate()
        assert said(process) == "ended", "one after the loop has ended does no harm either"
        assert process.wait(60) == 0


@pytest.mark.parametrize(("verb", "survives"), [("run", True), ("serve", True), ("status", False)])
def test_one_that_comes_while_a_daemon_imports_its_modules_does_not_end_it(verb: str, survives: bool) -> None:
    """Its first import is enough; what comes then is delivered as any other."""
    program = (
        "import signal, sys\nfrom agent.operator import early_hangups\nsignal.raise_signal(signal.SIGHUP)\n"
        "from agent.operator.hangups import Hangups\nprint(Hangups()._pending)"
    )
    ended = subprocess.run([sys.executable, "-c", program, verb], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == ((0, "True\n") if survives else (-signal.SIGHUP, ""))
    first = Path(cli.__file__).read_text().split("\nimport ")[0].splitlines()
    assert any(line.startswith("from agent.operator import early_hangups") for line in first)


def in_terminal(command: list[str]) -> tuple[int, int]:
    """A process with a terminal of its own, and this end of it."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(command[0], command)
    return pid, terminal


@pytest.mark.parametrize("ignored", [False, True])
def test_a_program_ends_with_its_terminal_unless_that_was_to_be_ignored(tmp_path: Path, ignored: bool) -> None:
    out = tmp_path / "out"
    deaf = "trap '' HUP; " if ignored else ""
    shell = f"{deaf}exec '{sys.executable}' -c \"$PROGRAM\" > '{out}'"
    os.environ["PROGRAM"] = PROGRAM
    try:
        pid, terminal = in_terminal(["/bin/sh", "-c", shell])
    finally:
        del os.environ["PROGRAM"]
    try:
        _until(lambda: out.exists() and "listens" in out.read_text())
        os.close(terminal)
        if ignored:
            os.kill(pid, signal.SIGHUP)
            _until(lambda: "again" in out.read_text())
            os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert ("gone" in out.read_text()) is not ignored
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


def _until(done: object) -> None:
    deadline = time.monotonic() + 120
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
