"""Lines that come again and again, and a disk that takes none."""

import errno
import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import logs
from shared.log_repeats import MOST_KINDS, Repeats


class Log:
    """A log file, and the time that its writer sees."""

    def __init__(self, path: Path) -> None:
        self.path, self.now_s = path, 1000.0

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    made = Log(tmp_path / "agent.log")
    monkeypatch.setattr("shared.logs.time", SimpleNamespace(monotonic=lambda: made.now_s))
    logs.configure(made.path)
    yield made
    logs.configure(None)


def test_a_library_that_repeats_itself_writes_one_line_a_minute_and_a_count(log: Log) -> None:
    library = logging.getLogger("asyncio")
    for number in range(100_000 // 10):
        library.error(f"socket.accept() out of system resource\nsocket: <fd={number}>", exc_info=OSError(24, "x"))
    assert [line["event"][:15] for line in log.lines()] == ["socket.accept()"]
    log.now_s += 61
    logs.get_logger("agent").info("of_ours")
    told = log.lines()[1]
    assert (told["event"], told["repeated"], told["logger"], told["level"]) == ("repeated", 9_999, "asyncio", "warning")
    assert told["of"] == "socket.accept() out of system resource"
    library.error("socket.accept() out of system resource")
    assert [line["event"][:15] for line in log.lines()[2:]] == ["of_ours", "socket.accept()"]


def test_different_complaints_are_told_apart_and_arguments_do_not_make_them_different(log: Log) -> None:
    for number in range(50):
        logging.getLogger("aiohttp.server").error("Error handling request from %s", f"10.0.0.{number}")
        logging.getLogger("aiohttp.server").warning("another at 0x%x", number)
        logging.getLogger("apscheduler").error(f"job {number} raised")
        record = logging.LogRecord("apscheduler", logging.ERROR, "x", 1, "%d is no number", ("text",), None)
        logging.getLogger().handlers[0].handle(record)
    found = Counter((line["logger"], line["event"].partition(" ")[0]) for line in log.lines())
    assert found == {
        ("aiohttp.server", "Error"): 1,
        ("aiohttp.server", "another"): 1,
        ("apscheduler", "job"): 1,
        ("apscheduler", "unreadable"): 1,
    }


def test_a_library_that_finds_ever_new_words_is_bounded_in_lines_and_in_memory(log: Log) -> None:
    for number in range(5_000):
        word = "".join(chr(97 + int(digit)) for digit in str(number))
        logging.getLogger("aiohttp").error(f"{word} " + "x" * 10_000)
    assert len(log.lines()) <= MOST_KINDS + 1
    assert log.path.stat().st_size < 1 << 20


def test_what_nobody_can_catch_is_written_once_a_minute_without_what_it_is_about(
    log: Log, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Told:
        def __repr__(self) -> str:
            return "a secret"

        def __del__(self) -> None:
            raise ValueError("a secret")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the test's own returns afterwards
    logs.catch_unraisable()
    for _ in range(100):
        Told()
    (line,) = log.lines()
    assert (line["logger"], line["event"], line["error"]) == (
        "python",
        "unraisable ValueError in function",
        "ValueError",
    )
    assert line["at"][-1].startswith("test_logs.py:")
    assert "secret" not in log.path.read_text()
    assert capfd.readouterr() == ("", "")


def test_counts_are_told_while_other_threads_complain(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is counted between what is told and what is forgotten."""
    library, entered = logging.getLogger("asyncio"), threading.Event()
    for _ in range(5):
        library.error("again")
    log.now_s += 61
    handler = logging.getLogger().handlers[0]
    real = handler._repeats._forget  # type: ignore[attr-defined]

    def forget(now_s: float) -> None:
        other.start()
        entered.wait(0.2)  # it may not come in before what is due has been forgotten
        real(now_s)

    def complain() -> None:
        library.error("again")
        library.error("again")
        entered.set()

    other = threading.Thread(target=complain)
    monkeypatch.setattr(handler._repeats, "_forget", forget)  # type: ignore[attr-defined]
    logs.get_logger("agent").info("of_ours")
    other.join(60)
    monkeypatch.setattr(handler._repeats, "_forget", real)  # type: ignore[attr-defined]
    log.now_s += 61
    logs.get_logger("agent").info("of_ours")
    told = [line["repeated"] for line in log.lines() if line["event"] == "repeated"]
    written = [line for line in log.lines() if line["event"] == "again"]
    assert sum(told) + len(written) == 7, "each is written or counted, and none twice"


def test_a_file_system_without_modes_takes_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "x")

    monkeypatch.setattr(os, "chmod", chmod)
    logs.configure(tmp_path / "agent.log")
    logs.get_logger("agent").info("of_ours")
    logs.configure(None)
    assert "of_ours" in (tmp_path / "agent.log").read_text()


def test_our_own_lines_are_all_written(log: Log) -> None:
    for number in range(200):
        logs.get_logger("agent").info("request", ms=number)
    assert [line["ms"] for line in log.lines()] == list(range(200))


@pytest.mark.parametrize("full", ["error", "short"])
def test_a_full_disk_is_visible_and_costs_lines_only(log: Log, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    def write(file: int, text: bytes) -> int:
        if full == "short":
            return len(text) - 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert logs.state() == {"lost_lines": 0, "problem": ""}
    with monkeypatch.context() as patch:
        patch.setattr("shared.logs.os.write", write)
        for _ in range(3):
            logs.get_logger("agent").info("lost")
        logging.getLogger("aiohttp").error("lost, too")
        assert logs.state() == {"lost_lines": 4, "problem": "No space left on device"}
    logs.get_logger("agent").info("again")
    assert [line["event"] for line in log.lines()] == ["again"]
    assert logs.state() == {"lost_lines": 4, "problem": ""}


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40)), max_size=200), st.integers(1, 4))
def test_every_line_is_written_or_counted(steps: list[tuple[int, int]], burst: int) -> None:
    repeats, now_s = Repeats(burst=burst), 0.0
    written, told = Counter[int](), 0
    seen_at: dict[int, list[float]] = {}
    for kind, wait_s in steps:
        now_s += wait_s
        told += sum(count for _, count in repeats.due(now_s)) if now_s >= repeats.next_s else 0
        if (before := repeats.take(kind, now_s)) is not None:
            assert before == 0, "it has been told"
            written[kind] += 1
            seen_at.setdefault(kind, []).append(now_s)
    told += sum(count for _, count in repeats.due(now_s + 61))
    assert written.total() + told == len(steps)
    for times in seen_at.values():
        assert all(sum(at <= one < at + 60 for one in times) <= 2 * burst for at in times)


def test_the_level_can_change_while_it_runs(log: Log) -> None:
    """Also for loggers that have written before, which structlog caches."""
    logger = logs.get_logger("levels")
    logger.debug("one")
    logger.info("two")
    logs.set_level("debug")
    logger.debug("three")
    logging.getLogger("of a library").debug("four")
    logs.set_level("error")
    logger.warning("five")
    logger.error("six")
    logs.set_level("info")
    logger.info("seven")
    assert [line["event"] for line in log.lines()] == ["two", "three", "four", "six", "seven"]
