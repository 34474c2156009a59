"""A terminal on one of the walk's machines: blocks of shell run one after another, as if they were typed there."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scripts.walk.machines import Machine

_BEGIN = """set -a
cd "$(cat {cwd})"
. {env}
trap 'pwd > {cwd}; export -p > {env}' EXIT
set -e
"""
"""Folder and variables of the block before, kept for the one after; a command that fails ends the block."""


class Ran(NamedTuple):
    """What came of a block: its exit status (None: it did not end in time), what it printed, and how long it took."""

    status: int | None
    output: str
    seconds: float


class Terminal:
    """Runs blocks on a machine; ``told`` is given each line that they print."""

    def __init__(self, machine: Machine, told: Callable[[str], None], python: str = sys.executable) -> None:
        self._machine, self._told, self._python = machine, told, python
        self._folder = machine.home.parent
        self._cwd, self._env = self._folder / "cwd", self._folder / "env"
        self._cwd.write_text(f"{machine.home}\n")
        self._env.write_text("")
        self._numbers = itertools.count(2)
        self._open: list[tuple[subprocess.Popen[bytes], bool]] = []

    def run(self, text: str, language: str, limit_s: float) -> Ran:
        """Run a block to its end, and end it after ``limit_s``."""
        began, log = time.monotonic(), self._folder / "output"
        process = self._started(text, language, log)
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
            end(process)
        output = log.read_text(errors="replace")
        for line in output.splitlines():
            self._told(line)
        return Ran(status, output, time.monotonic() - began)

    def open(self, text: str, until: str, limit_s: float, *, lasts: bool = False) -> Ran:
        """Run a block that does not end in a terminal of its own, and return when it has printed ``until``; ``lasts``
        keeps it until the very end."""
        began, log = time.monotonic(), self._folder / f"output of terminal {next(self._numbers)}"
        process = self._started(text, "sh", log)
        self._open.append((process, lasts))
        while until not in (output := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() - began > limit_s:
                return Ran(process.poll() or 1, output, time.monotonic() - began)
            time.sleep(0.05)
        for line in output.splitlines():
            self._told(line)
        return Ran(0, output, time.monotonic() - began)

    def close(self, *, everything: bool = True) -> None:
        """Ctrl-C in the other terminals, or in those that do not last, and wait until what ran there has ended."""
        for process, lasts in self._open:
            if everything or not lasts:
                end(process, signal.SIGINT)
        self._open = [] if everything else [(process, lasts) for process, lasts in self._open if lasts]

    def _started(self, text: str, language: str, log: Path) -> subprocess.Popen[bytes]:
        script = self._folder / f"block.{language}"
        # the other terminals keep their own folder and variables
        begin = _BEGIN.format(cwd=f"'{self._cwd}'", env=f"'{self._env}'") if language == "sh" else ""
        script.write_text(begin + text)
        program = "/bin/sh" if language == "sh" else self._python
        with log.open("wb") as out:
            return subprocess.Popen(
                [program, str(script)],
                cwd=self._machine.home,
                env=self._machine.environ() | self._kept(language),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a walk that runs in the background ignores it, and so would every shell
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def _kept(self, language: str) -> dict[str, str]:
        """Variables of the blocks before, for a program that is no shell; only plain ones are needed."""
        if language == "sh":
            return {}
        found = re.findall(r"^(?:export|declare -x) ([A-Z_]+)='([^'\n]*)'$", self._env.read_text(), re.MULTILINE)
        return {name: value for name, value in found if name not in ("PATH", "HOME", "PYTHONPATH")}


def end(process: subprocess.Popen[bytes], first: int = signal.SIGTERM) -> None:
    """End a process and what it started: by ``first``, then by SIGKILL."""
    for number, limit_s in ((first, 60.0), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)
            return
