"""What keeps the machine awake: one contract for the program of macOS and for its stand-in."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.process import awake
from agent.process.awake import Awake
from tests.mac_stand_ins import put


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def command(tmp_path: Path) -> Callable[[int], list[str]]:
    """The real program on a Mac; elsewhere the stand-in."""
    program = awake.COMMAND[0] if sys.platform == "darwin" else str(put(tmp_path, "caffeinate") / "caffeinate")
    return lambda pid: [program, *awake.COMMAND[1:-1], str(pid)]


async def with_one(one: Awake, use: Callable[[Awake], Awaitable[None]]) -> None:
    one.start()
    try:
        await use(one)
    finally:
        await one.close()


async def test_it_is_held_until_it_is_let_go(command: Callable[[int], list[str]]) -> None:
    one = Awake(command(os.getpid()))
    assert one.view() == {"state": "not_held", "pid": None, "starts": 0, "problem": ""}
    one.start()
    one.start()
    await until(lambda: one.pid is not None)
    pid = one.pid
    assert pid is not None
    assert (one.view()["state"], one.warnings(), one.starts) == ("held", [], 1)
    await one.close()
    assert (lives(pid), one.pid) == (False, None)
    await one.close()


async def test_one_that_is_killed_is_started_again(command: Callable[[int], list[str]]) -> None:
    async def use(one: Awake) -> None:
        await until(lambda: one.pid is not None)
        os.kill(one.pid or 0, signal.SIGKILL)
        await until(lambda: one.starts == 2 and one.pid is not None)
        assert one.view()["problem"].endswith("ended with status -9")
        assert one.warnings() == [], "it is held again"

    await with_one(Awake(command(os.getpid()), delay_s=0.01), use)


async def test_the_program_ends_with_the_agent_however_that_ends(command: Callable[[int], list[str]]) -> None:
    agent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def use(one: Awake) -> None:
        await until(lambda: one.pid is not None)
        agent.kill()
        await asyncio.to_thread(agent.communicate)
        await until(lambda: "ended with status 0" in one.problem)

    await with_one(Awake(command(agent.pid), delay_s=30), use)


async def test_what_cannot_be_held_is_a_warning_that_says_what_to_do(tmp_path: Path) -> None:
    async def cannot(one: Awake) -> None:
        await until(lambda: bool(one.problem))
        assert one.view()["state"] == "not_held"
        (warning,) = one.warnings()
        assert "may go to sleep" in warning
        assert "set `sudo pmset -a sleep 0`" in warning

    await with_one(Awake(["/nowhere/caffeinate"], delay_s=30), cannot)
    program = str(put(tmp_path, "caffeinate") / "caffeinate")
    (tmp_path / "refuses").touch()

    async def refused(one: Awake) -> None:
        await cannot(one)
        assert "ended with status 70" in one.problem

    await with_one(Awake([program, "-i"], delay_s=30), refused)


async def test_delays_grow_while_it_fails_and_start_again_after_a_steady_run() -> None:
    waited, done = list[float](), asyncio.Event()
    clock = iter([0.0] * 16 + [0.0, awake.STEADY_S] + [0.0] * 100)

    async def sleep(delay_s: float) -> None:
        waited.append(delay_s)
        if len(waited) == 11:
            done.set()
        await asyncio.sleep(0)

    async def use(_: Awake) -> None:
        async with asyncio.timeout(60):
            await done.wait()

    await with_one(Awake(["/nowhere/caffeinate"], clock=lambda: next(clock), sleep=sleep), use)
    assert waited[:11] == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2, 4]


async def test_other_systems_hold_nothing() -> None:
    one = Awake()
    one.start()
    assert (one.view()["state"], one.warnings(), one.pid) == ("not_needed", [], None)
    await one.close()


def test_only_macos_has_one() -> None:
    expected = "not_held" if sys.platform == "darwin" else "not_needed"
    assert awake.of_this_machine().view()["state"] == expected
    assert awake.COMMAND[-1] == str(os.getpid())


async def test_a_program_that_ignores_signals_does_not_hold_the_agent_s_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "END_S", 0.2)
    held = Awake(("/bin/sh", "-c", "trap '' TERM; echo > /dev/null; while :; do sleep 0.1; done"))
    held.start()
    await until(lambda: held.pid is not None)
    await asyncio.sleep(0.3)  # until the trap is set; before, SIGTERM ends it, too
    pid = held.pid
    assert pid is not None
    async with asyncio.timeout(60):
        await held.close()
    assert not lives(pid)
