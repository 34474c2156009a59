"""The audit of a node: events, files that are closed, shipped and pruned in time, and what is shown of it."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.api.host_metrics import HostMetrics
from agent.audit import service
from agent.audit.disk import read, segments
from agent.audit.service import Audit
from agent.config import AgentConfig, Live, Node
from agent.config import Audit as Settings
from agent.operator.statusview import audit_lines
from shared import keys
from shared.errors import Retryable
from shared.records import AuditFailing, AuditRecovered, Event
from shared.store import ObjectStore, list_all
from shared.store_dir import DirectoryStore
from tests.agent.audit.test_log import Faulty, away, entry

CONFIG = AgentConfig(node=Node(id="n1", rack="r"))


@asynccontextmanager
async def node(
    folder: Path, settings: Settings | None = None, store: Callable[[], ObjectStore] | None = None
) -> AsyncIterator[tuple[Audit, list[Event]]]:
    live, events = Live(msgspec.structs.replace(CONFIG, audit=settings or Settings())), list[Event]()
    known = {"node": "n1".__eq__}
    opened = store or (lambda: DirectoryStore(folder / "bucket"))
    audit = away(lambda: Audit(live, folder, opened, events.append, known))  # type: ignore[arg-type]
    try:
        yield audit, events
    finally:
        async with asyncio.timeout(60):
            await audit.close()
            while audit.hangs:
                await asyncio.sleep(0.005)


async def ticking(audit: Audit, done: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not done():
            await audit.tick()
            await asyncio.sleep(0.005)


async def test_a_log_that_fails_tells_it_and_repeats_it_and_tells_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path) as (audit, events):
        disk = audit.log._disk = Faulty()
        await audit.tick()
        assert events == []
        assert audit.warnings() == []
        disk.write_error = errno.ENOSPC
        for n in range(3):
            audit.log.write(entry(n))
        await audit.tick()
        await audit.tick()
        (failing,) = events
        assert isinstance(failing, AuditFailing)
        assert (failing.why, failing.lost) == ("full", 3)
        (warning,) = audit.warnings()
        assert "cannot be written" in warning
        assert "No space left on device" in warning
        monkeypatch.setattr(service, "TOLD_EVERY_S", 0.0)
        await audit.tick()
        assert len(events) > 1
        disk.write_error = 0
        await ticking(audit, lambda: audit.log.ok)
        recovered = events[-1]
        assert isinstance(recovered, AuditRecovered)
        assert (recovered.why, recovered.lost, recovered.since_ms) == ("full", 3, failing.since_ms)
        assert audit.warnings() == []


async def test_a_deleted_folder_is_told_though_it_is_mended_at_once(tmp_path: Path) -> None:
    async with node(tmp_path) as (audit, events):
        await ticking(audit, lambda: audit.log.status()["synced_seq"] == 1)
        shutil.rmtree(tmp_path / "audit")
        await ticking(audit, lambda: len(events) == 2)
        assert [type(one) for one in events] == [AuditFailing, AuditRecovered]


async def test_files_are_closed_shipped_and_pruned_in_time(tmp_path: Path) -> None:
    settings = Settings(segment_s=0.01, keep_days=1, keep_bytes=32 << 20)
    async with node(tmp_path, settings) as (audit, _):
        audit.log.write(entry(1))
        await ticking(audit, lambda: len(away(lambda: segments(tmp_path / "audit"))) > 1)
        audit._next_s = 0.0
        await ticking(audit, lambda: audit.status()["shipped"]["seq"])
        (first, *_) = away(lambda: segments(tmp_path / "audit"))
        os.utime(first.path, (0, 0))
        audit._next_s = 0.0
        await ticking(audit, lambda: not first.path.exists())
    assert len(list_all(DirectoryStore(tmp_path / "bucket"), keys.AUDIT_PREFIX)) >= 1


async def test_seal_closes_and_ships_at_once(tmp_path: Path) -> None:
    async with node(tmp_path) as (audit, _):
        audit.log.write(entry(1))
        said = await audit.seal()
        assert (said["seq"], said["shipped"]["seq"], said["shipped"]["problem"]) == (3, 2, "")
        said = await audit.seal()
        assert (said["seq"], said["shipped"]["seq"]) == (3, 2), "an empty file is not closed"
    assert len(list_all(DirectoryStore(tmp_path / "bucket"), keys.AUDIT_PREFIX)) == 1
    assert [one.t_ms for one in away(lambda: list(read(tmp_path / "audit")))] == [1]


async def test_a_store_that_is_away_keeps_the_files_and_is_shown(tmp_path: Path) -> None:
    def away_now() -> ObjectStore:
        raise Retryable("the store does not respond")

    async with node(tmp_path, store=away_now) as (audit, events):
        audit.log.write(entry(1))
        said = await audit.seal()
        assert said["shipped"]["problem"] == "the store does not respond"
        assert audit.log.ok, "requests do not depend on it"
        assert events == []
        (line,) = audit_lines(said)
        assert (
            line == "audit: ok, 3 lines, 0 of them in the bucket, 1 files wait for upload; the store does not respond"
        )


async def test_switched_off_there_is_nothing(tmp_path: Path) -> None:
    async with node(tmp_path, Settings(enabled=False)) as (audit, events):
        await audit.tick()
        assert audit_lines(await audit.seal()) == ["audit: off (audit.enabled)"]
        assert audit.log.ok
        assert events == []
        assert "audit" not in exposition(audit)
    assert not (tmp_path / "audit").exists()


def exposition(audit: Audit) -> dict[str, float]:
    push = {"waiting_batches": 0, "held_windows": 0, "state": "ok", "dropped_batches": 0}
    metrics = HostMetrics({"node": "n1"}, lambda: push, list, audit.status)
    return {s.name: s.value for family in metrics.collect() for s in family.samples if "_audit_" in s.name}


async def test_its_metrics(tmp_path: Path) -> None:
    async with node(tmp_path) as (audit, _):
        audit.log.write(entry(1))
        assert exposition(audit) == {
            "mlxrack_audit_ok": 1.0,
            "mlxrack_audit_waiting_files": 0.0,
            "mlxrack_audit_written_entries_total": 1.0,
            "mlxrack_audit_lost_entries_total": 0.0,
        }
        disk = audit.log._disk = Faulty()
        disk.write_error = errno.EIO
        audit.log.write(entry(2))
        found = exposition(audit)
        assert (found["mlxrack_audit_ok"], found["mlxrack_audit_lost_entries_total"]) == (0.0, 1.0)
        (line,) = audit_lines(audit.status())
        assert line.startswith("audit: FAILS (since ")
        assert "1 entries lost since the start" in line
