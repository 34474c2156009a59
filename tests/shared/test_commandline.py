"""Both programs end quietly when nobody reads their output any more, by real processes and pipes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from aggregator import cli
from shared.commandline import READER_LEFT, until_the_reader_leaves
from shared.store_dir import DirectoryStore
from tests.aggregator.test_bucket import directory, minute, put


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration whose bucket has the reports of a week."""
    made = str(directory(tmp_path))
    put(DirectoryStore(tmp_path / "bucket"), *(minute(n) for n in range(3)))
    assert cli.main(["weekly", "--week", "2026-W47", "--quiet", "--config", made]) == 0
    return made


def into_a_closed_pipe(words: Sequence[str], *, errors_too: bool = False, **more: str) -> subprocess.Popen[bytes]:
    """A run of a program into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | more
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", *words],
            stdout=writer,
            stderr=subprocess.STDOUT if errors_too else subprocess.PIPE,
            env=environ,
        )
    finally:
        os.close(writer)


def test_every_verb_ends_quietly_when_its_reader_has_left(config: str, tmp_path: Path) -> None:
    buying = ["aggregator", "economics", "--api-spend", "12000", "--nodes", "4"]
    missing = ["--config", str(tmp_path / "missing.toml")]
    runs = [
        into_a_closed_pipe(buying),
        into_a_closed_pipe([*buying, "--json"], PYTHONUNBUFFERED="1"),
        into_a_closed_pipe(["aggregator", "list", "--config", config]),
        into_a_closed_pipe(["aggregator", "show", "--config", config]),
        into_a_closed_pipe(["aggregator", "check-config", *missing], errors_too=True),
        into_a_closed_pipe(["agent", "chips"]),
        into_a_closed_pipe(["agent", "models", "recommend", "--memory", "64"], PYTHONUNBUFFERED="1"),
        into_a_closed_pipe(["agent", "help", "security"]),
        into_a_closed_pipe(["agent", "check-config", *missing], errors_too=True),
    ]
    ended = [(run.communicate(timeout=120)[1], run.returncode) for run in runs]
    assert READER_LEFT == 128 + signal.SIGPIPE
    assert [status for _, status in ended] == [READER_LEFT] * len(runs)
    assert [told or b"" for told, _ in ended] == [b""] * len(runs)


def test_a_reader_that_reads_everything_gets_everything() -> None:
    words = [sys.executable, "-P", "-m", "agent", "chips"]
    done = subprocess.run(words, capture_output=True, timeout=120, check=True)
    assert b"M4 Pro" in done.stdout


def test_a_program_without_an_output_does_its_work(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = [
        sys.executable,
        "-P",
        "-m",
        "aggregator",
        "economics",
        "--tokens",
        "1b",
        "--nodes",
        "1",
        "--html",
        str(page),
    ]
    done = subprocess.run(f"exec {' '.join(words)} >&-", shell=True, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert page.exists()


def test_a_connection_that_breaks_is_not_taken_for_a_reader() -> None:
    here, there = socket.socketpair()
    there.close()

    @until_the_reader_leaves
    def sends(argv: Sequence[str] | None = None) -> int:
        return here.send(b"x")

    with here, pytest.raises(BrokenPipeError):
        sends()
