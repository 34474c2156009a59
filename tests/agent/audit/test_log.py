"""The audit log on a disk: what is lost when a process, the power or the disk fails, and that it says so."""

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.audit import disk as files
from agent.audit import log as audit_log
from agent.audit.chain import Fault, Verdict
from agent.audit.disk import Disk, read
from agent.audit.entry import Entry, Gap, decode
from agent.audit.log import AuditLog
from agent.operator.cli_audit import verified
from shared.errors import Halt, Retryable

NODE = "n1"
T = TypeVar("T")


class Faulty(Disk):
    """A disk with faults: ``write`` and ``sync`` raise their errors, ``short`` writes that many bytes of a line, a
    cleared ``gate`` holds syncs back."""

    def __init__(self) -> None:
        self.write_error = self.sync_error = self.create_error = 0
        self.short: int | None = None
        self.syncs = 0
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def write(self, descriptor: int, line: bytes) -> int:
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error))
        if self.short is not None:
            return super().write(descriptor, line[: self.short])
        return super().write(descriptor, line)

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        self.entered.set()
        assert self.gate.wait(60)
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        super().sync(descriptor)

    def create(self, path: Path) -> int:
        if self.create_error:
            raise OSError(self.create_error, os.strerror(self.create_error))
        return super().create(path)


def entry(n: int) -> Entry:
    return Entry(kind="ended", t_ms=n, request=f"req_{n:024x}", node=NODE, outcome="ok", status=200)


def away(work: Callable[[], T]) -> T:
    """In a thread, since it blocks; the agent does so at its start, before there is a loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def opened(folder: Path, disk: Disk | None = None) -> AuditLog:
    return away(lambda: AuditLog(folder / "audit", node=NODE, known=lambda of, name: name == NODE, disk=disk))


@asynccontextmanager
async def running(folder: Path, disk: Disk | None = None) -> AsyncIterator[AuditLog]:
    log = opened(folder, disk)
    try:
        yield log
    finally:
        await log.close()


async def until(log: AuditLog, *, ok: bool) -> None:
    async with asyncio.timeout(60):
        while log.ok != ok:
            await log.tick()
            await asyncio.sleep(0.005)


def numbers(folder: Path) -> list[int]:
    return [one.t_ms for one in away(lambda: list(read(folder / "audit")))]


def gaps(folder: Path) -> list[Gap]:
    contents = away(lambda: list(files.contents(folder / "audit")))
    lines = [line for _, content in contents for line in content.splitlines(keepends=True)]
    return [one for one in map(decode, lines) if isinstance(one, Gap)]


def whole(folder: Path) -> Verdict:
    verdict = away(lambda: verified(folder / "audit"))
    assert verdict.fault is None, verdict
    return verdict


def fault_of(folder: Path) -> Fault:
    fault = away(lambda: verified(folder / "audit")).fault
    assert fault is not None
    return fault


async def test_entries_are_written_in_order_and_the_chain_goes_on_over_restarts(tmp_path: Path) -> None:
    for run in range(3):
        async with running(tmp_path) as log:
            for n in range(run * 4, run * 4 + 4):
                assert log.write(entry(n))
            assert await log.durable()
            if run == 1:
                log.rotate()
    assert numbers(tmp_path) == list(range(12))
    verdict = whole(tmp_path)
    assert (verdict.files, verdict.lines) == (4, 16)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "audit").iterdir()} == {"0o600"}
    assert oct((tmp_path / "audit").stat().st_mode & 0o777) == "0o700"


async def test_one_writer_has_the_folder(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        with pytest.raises(Halt, match="in use by another agent"):
            opened(tmp_path)
        assert log.write(entry(1))
    async with running(tmp_path):
        pass


async def test_what_is_written_within_a_moment_shares_a_sync(tmp_path: Path) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        for n in range(500):
            log.write(entry(n))
        assert await log.durable()
        assert disk.syncs <= 2
        assert await log.durable(), "at once"
        assert disk.syncs <= 2
        await log.tick()
        await log.tick()
    assert disk.syncs <= 2, "nothing new was written"


async def test_durable_waits_for_a_sync_that_began_after_the_line_was_written(tmp_path: Path) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        disk.gate.clear()
        log.write(entry(1))
        first = asyncio.ensure_future(log.durable())
        await asyncio.to_thread(disk.entered.wait, 60)
        disk.entered.clear()
        log.write(entry(2))
        second = asyncio.ensure_future(log.durable())
        await asyncio.sleep(0.05)
        assert not first.done(), "the loop goes on meanwhile"
        assert not second.done()
        before = disk.syncs
        disk.gate.set()
        assert await first
        assert await second
        assert disk.syncs == before + 1


async def test_without_anybody_waiting_lines_are_synced_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        log.write(entry(1))
        async with asyncio.timeout(60):
            while log.status()["synced_seq"] < log.status()["seq"]:
                await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EFBIG, "full"),
        (errno.EROFS, "read_only"),
        (errno.EIO, "error"),
        (errno.ESTALE, "deleted"),
    ],
)
async def test_a_disk_that_refuses_a_line_is_a_problem_and_the_gap_is_counted(
    tmp_path: Path, error: int, why: str
) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        assert log.write(entry(0))
        assert await log.durable()
        disk.write_error = error
        assert not log.write(entry(1)), "and raises nothing"
        assert not log.ok
        assert os.strerror(error) in log.problem
        assert not await log.durable()
        with pytest.raises(Retryable, match="audit log cannot be written") as refused:
            await log.write_first(entry(2))
        assert refused.value.code == "audit_unavailable"
        await log.tick()
        assert not log.ok, "it was tried again"
        disk.write_error = 0
        await until(log, ok=True)
        assert log.problem == ""
        await log.write_first(entry(3))
        assert log.status()["synced_seq"] == log.status()["seq"]
    assert numbers(tmp_path) == [0, 3]
    (gap,) = gaps(tmp_path)
    assert (gap.lost, gap.why) == (2, why)
    whole(tmp_path)


@pytest.mark.parametrize("short", [0, 1, 60])
async def test_a_line_that_did_not_fit_is_left_and_counted(tmp_path: Path, short: int) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        log.write(entry(0))
        disk.short = short
        assert not log.write(entry(1))
        assert not log.ok
        await log.tick()
        assert not log.ok
        disk.short = None
        await until(log, ok=True)
        log.write(entry(2))
    assert numbers(tmp_path) == [0, 2]
    assert gaps(tmp_path)[0].lost == 1
    assert whole(tmp_path).files == 2


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_a_sync_that_fails_is_not_tried_again_on_that_file(tmp_path: Path, error: int) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        log.write(entry(0))
        assert await log.durable()
        disk.sync_error = error
        log.write(entry(1))
        assert not await log.durable(), "who waits is told"
        assert not log.ok
        await log.tick()
        assert not log.ok
        disk.sync_error = 0
        await until(log, ok=True)
        assert await log.durable()
    assert whole(tmp_path).files == 2
    (gap,) = gaps(tmp_path)
    assert (gap.lost, gap.unsynced) == (0, 1)


async def test_a_disk_that_does_not_answer_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        assert await log.durable()
        disk.gate.clear()
        monkeypatch.setattr(audit_log, "HUNG_S", 0.1)
        assert log.write(entry(1))
        assert not await log.durable()
        monkeypatch.setattr(audit_log, "HUNG_S", 60.0)
        assert "has not synced" in log.problem
        assert log.trouble is not None
        assert log.trouble.why == "no_answer"
        assert not log.write(entry(2))
        await log.tick()
        assert not log.ok
        assert log.hangs
        disk.gate.set()
        await until(log, ok=True)
        assert await log.durable()
    whole(tmp_path)
    assert gaps(tmp_path)[0].lost == 1


async def test_a_disk_that_hangs_is_noticed_without_anybody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Faulty()
    async with running(tmp_path, disk) as log:
        disk.gate.clear()
        monkeypatch.setattr(audit_log, "HUNG_S", 0.1)
        log.write(entry(1))
        await until(log, ok=False)
        monkeypatch.setattr(audit_log, "HUNG_S", 60.0)
        disk.gate.set()
        await until(log, ok=True)


@pytest.mark.parametrize("what", ["folder", "file", "replaced"])
async def test_a_deleted_log_is_noticed_and_begun_again(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "audit"
    async with running(tmp_path) as log:
        log.write(entry(0))
        assert await log.durable()
        path = folder / log.current()
        if what == "folder":
            shutil.rmtree(folder)
        else:
            path.unlink()
            if what == "replaced":
                path.write_bytes(b"")
        await until(log, ok=False)
        assert log.trouble is not None
        assert log.trouble.why == "deleted"
        await until(log, ok=True)
        assert log.write(entry(1))
        assert await log.durable()
        if what == "folder":
            with pytest.raises(Halt):
                opened(tmp_path)
    assert numbers(tmp_path) == [1]
    fault_of(tmp_path)  # what was deleted stays named
    assert gaps(tmp_path)[0].why == "deleted"


async def test_an_agent_starts_without_a_disk_and_begins_when_there_is_one(tmp_path: Path) -> None:
    disk = Faulty()
    disk.create_error = errno.EROFS
    async with running(tmp_path, disk) as log:
        assert not log.ok
        assert not log.write(entry(0))
        disk.create_error = 0
        await until(log, ok=True)
        assert log.write(entry(1))
    assert numbers(tmp_path) == [1]
    assert gaps(tmp_path)[0].lost == 1
    whole(tmp_path)


async def test_switched_off_it_writes_nothing_and_refuses_nobody(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", node=NODE, known=lambda of, name: True, enabled=False)
    assert log.write(entry(1))
    assert log.ok
    assert await log.durable()
    await log.tick()
    await log.close()
    assert not (tmp_path / "audit").exists()


async def test_files_are_pruned_and_the_log_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        for n in range(4):
            log.write(entry(n))
            log.rotate()
        found = away(lambda: files.segments(tmp_path / "audit"))
        await log.prune(found[2].first - 1, [one.path for one in found[:2]])
    assert numbers(tmp_path) == [2, 3]
    assert whole(tmp_path).first == found[2].first
    (tmp_path / "audit" / found[2].path.name).unlink()
    assert "missing" in fault_of(tmp_path).what, "more than it says"


async def test_a_file_ends_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "SEGMENT_BYTES", 2000)
    async with running(tmp_path) as log:
        for n in range(40):
            log.write(entry(n))
        assert await log.durable()
        log.rotate()
        log.rotate()
    found = away(lambda: files.segments(tmp_path / "audit"))
    assert 3 < len(found) < 12
    assert all(one.size < 3000 for one in found)
    assert numbers(tmp_path) == list(range(40))
    whole(tmp_path)


@pytest.mark.parametrize("cut", [1, 40, 200])
async def test_a_loss_of_power_costs_what_was_not_synced_and_the_next_start_goes_on(tmp_path: Path, cut: int) -> None:
    """As after one: a part of the last line is on the disk, and its file says so later."""
    folder = tmp_path / "audit"
    async with running(tmp_path) as log:
        for n in range(3):
            log.write(entry(n))
    (path,) = [one.path for one in away(lambda: files.segments(folder))]
    body = path.read_bytes()
    (folder / files.TIP).unlink()
    path.write_bytes(body[:-cut])
    lost = body[-cut - 1 :].count(b"\n")
    async with running(tmp_path) as log:
        log.write(entry(9))
    assert numbers(tmp_path) == [*range(3 - lost), 9]
    assert whole(tmp_path).files == 2
    assert path.read_bytes() == body[:-cut], "nothing is rewritten"


async def test_a_file_whose_beginning_was_never_written_is_no_file(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        log.write(entry(0))
    (tmp_path / "audit" / "000000000003.jsonl").write_bytes(b'{"seq":3,"line":"be')
    async with running(tmp_path) as log:
        log.write(entry(1))
    assert numbers(tmp_path) == [0, 1]
    whole(tmp_path)


@pytest.mark.parametrize("damage", ["garbage", "no begin", "binary"])
async def test_whatever_was_done_to_the_files_the_log_goes_on_and_verify_names_it(tmp_path: Path, damage: str) -> None:
    async with running(tmp_path) as log:
        for n in range(3):
            log.write(entry(n))
    (segment,) = away(lambda: files.segments(tmp_path / "audit"))
    lines = segment.path.read_bytes().splitlines(keepends=True)
    damaged = {"garbage": [b"x\n"] * 4, "no begin": [b"x\n", *lines[1:]], "binary": [b"\xff\x00\n", *lines[1:3]]}
    segment.path.write_bytes(b"".join(damaged[damage]))
    async with running(tmp_path) as log:
        assert log.ok
        log.write(entry(9))
        assert await log.durable()
    assert numbers(tmp_path)[-1] == 9
    fault = fault_of(tmp_path)
    assert (fault.file, fault.line) == (segment.path.name, 1)


WRITER = """
import asyncio, os, sys
from pathlib import Path
from agent.audit.entry import Entry
from agent.audit.log import AuditLog
def entry(n):
    return Entry(kind="ended", t_ms=n, request=f"req_{n:024x}", node="n1", outcome="ok", status=200)
async def main():
    log, n = AuditLog(Path(sys.argv[1]), node="n1", known=lambda of, name: name == "n1"), 0
    while True:
        for _ in range(int(sys.argv[2])):
            assert log.write(entry(n))
            os.write(1, b"%d\\n" % n)
            n += 1
        if n % 40 == 0:
            log.rotate()
        await asyncio.sleep(0)
        if n % 90 == 0:
            await log.durable()
asyncio.run(main())
"""


@pytest.mark.parametrize("group", [1, 7])
def test_a_sigkill_loses_no_entry_that_was_written(tmp_path: Path, group: int) -> None:
    """Of those that `write` returned for; several times in a row, at random moments."""
    folder = tmp_path / "audit"
    before = 0
    for run in range(2):
        command = [sys.executable, "-c", WRITER, str(folder), str(group)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        told = [process.stdout.readline()]
        wait_s = random.Random(run).uniform(0.0, 0.15)
        killer = threading.Timer(wait_s, process.send_signal, [signal.SIGKILL])
        killer.start()
        told += process.stdout.read().splitlines(keepends=True)
        process.wait(timeout=60)
        process.stdout.close()
        said = len([line for line in told if line.endswith(b"\n")])
        found = [one.t_ms for one in read(folder)]
        written = len(found) - before
        assert said <= written <= said + 1, "the last one may have been written, and not said"
        assert found[before:] == list(range(written))
        before = len(found)
        assert verified(folder).fault is None
    assert before


LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from agent.audit import log as audit_log
from agent.audit.log import AuditLog
from tests.agent.audit.test_log import entry, until
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    log = AuditLog(Path(sys.argv[1]), node="n1", known=lambda of, name: name == "n1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    written = sum(log.write(entry(n)) for n in range(100))
    assert not log.ok, "the file may not grow"
    assert not await log.durable()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await until(log, ok=True)
    assert log.write(entry(100))
    assert await log.durable()
    await log.close()
    print(written)
asyncio.run(main())
"""


def test_a_real_limit_of_the_system_is_survived(tmp_path: Path) -> None:
    """EFBIG, after a short write: what a full disk does."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "audit")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    written = int(done.stdout.splitlines()[-1])
    assert 0 < written < 100
    assert numbers(tmp_path) == [*range(written), 100]
    (gap,) = gaps(tmp_path)
    assert (gap.lost, gap.why) == (100 - written, "full")
    whole(tmp_path)


def test_reading_passes_over_a_line_that_is_being_written(tmp_path: Path) -> None:
    async def write() -> None:
        async with running(tmp_path) as log:
            for n in range(3):
                log.write(entry(n))

    asyncio.run(write())
    (segment,) = files.segments(tmp_path / "audit")
    with segment.path.open("ab") as file:
        file.write(b'{"seq":5,"line":"entry","t_ms":')
    assert numbers(tmp_path) == [0, 1, 2]
    assert [one.t_ms for one in read(tmp_path / "audit", since_ms=1)] == [1, 2]
    assert list(read(tmp_path / "elsewhere")) == []


OPS = ("write", "write", "write", "rotate", "durable", "full", "short", "sync fails", "mend", "restart")


@settings(max_examples=40)
@given(st.lists(st.sampled_from(OPS), max_size=25))
def test_whatever_the_disk_does_what_was_accepted_is_there_and_the_chain_is_whole(ops: list[str]) -> None:
    async def play(folder: Path) -> list[int]:
        disk, accepted, n = Faulty(), list[int](), 0
        log = opened(folder, disk)
        for op in ops:
            match op:
                case "write":
                    n += 1
                    if log.write(entry(n)):
                        accepted.append(n)
                case "rotate":
                    log.rotate()
                case "durable":
                    assert await log.durable() == log.ok
                case "full":
                    disk.write_error = errno.ENOSPC
                case "short":
                    disk.short = 30
                case "sync fails":
                    disk.sync_error = errno.EIO
                case "mend":
                    disk.write_error = disk.sync_error = 0
                    disk.short = None
                    await until(log, ok=True)
                case "restart":
                    await log.close()
                    disk = Faulty()
                    log = opened(folder, disk)
        await log.close()
        return accepted

    with tempfile.TemporaryDirectory() as name:
        accepted = asyncio.run(play(Path(name)))
        assert numbers(Path(name)) == accepted
        verdict = verified(Path(name) / "audit")
        assert verdict.fault is None or verdict.fault.file == files.TIP, verdict
