"""A real loader with the fake engine: the order of preparation, and what becomes of those that wait."""

import asyncio
import contextlib
import errno
import os
import tempfile
from collections.abc import AsyncIterator
from typing import NoReturn

import msgspec
import pytest

from agent.process.loader_process import LoaderProcess, LoaderSpec, telling
from agent.wire.frames import Answer, Done, Failed, Generate, Message, Tokens, Waits
from agent.wire.namespaces import namespace_of
from agent.wire.priority import Priority
from shared.errors import Retryable


@contextlib.asynccontextmanager
async def running(*arguments: str, stuck_s: float = 600.0) -> AsyncIterator[LoaderProcess]:
    spec = LoaderSpec(arguments=("--engine", "fake", "--path", "x", *arguments), stuck_s=lambda: stuck_s)
    loader = await LoaderProcess.start(spec, os.environ)
    try:
        yield loader
    finally:
        loader.kill()
        await loader.ended.wait()


def ask(content: str, key: str = "", max_tokens: int = 1) -> Generate:
    return Generate(
        id=1,
        model="m",
        messages=(Message(role="user", content=content),),
        max_tokens=max_tokens,
        cache=namespace_of(key),
    )


async def last(answers: AsyncIterator[Answer]) -> Answer:
    found: Answer = Waits(id=0)
    async for answer in answers:
        found = answer
    return found


async def last_of(loader: LoaderProcess, request: Generate) -> Answer:
    return await last(loader.generate(request))


async def test_a_short_prompt_of_another_key_waits_for_no_more_than_the_one_in_preparation() -> None:
    large, ended = "word " * (1 << 20), []
    async with running() as loader:

        async def one(name: str, content: str, key: str) -> Answer:
            answer = await last_of(loader, ask(content, key))
            ended.append(name)
            return answer

        alice = [asyncio.create_task(one("alice", large, "alice")) for _ in range(6)]
        await asyncio.sleep(0)
        assert not isinstance(await one("bob", "hi", "bob"), Failed)
        refused = await asyncio.gather(*alice)
    assert {answer.code for answer in refused if isinstance(answer, Failed)} == {"context_length_exceeded"}
    assert len(refused) == 6
    assert ended.index("bob") <= 2, ended


async def test_requests_that_wait_are_told_so_and_those_that_nobody_wants_cost_nothing() -> None:
    large = "word " * (1 << 20)
    async with running() as loader:
        first = asyncio.create_task(last_of(loader, ask("!hang")))
        await asyncio.sleep(0)
        left = [asyncio.create_task(last_of(loader, ask(large))) for _ in range(50)]
        behind = loader.generate(ask("hi"))
        assert isinstance(await anext(behind), Waits)
        for task in (*left, first):
            task.cancel()
        await asyncio.gather(*left, first, return_exceptions=True)
        assert loader.silent_s > 0, "that its client left does not hide that it hangs"
        loader.kill()
        with contextlib.suppress(Retryable):
            async for answer in behind:
                assert isinstance(answer, Waits)
            raise AssertionError("it was answered by a loader that hangs")


async def test_a_hung_preparation_is_ended_with_its_loader_and_alone_is_suspect() -> None:
    async with running(stuck_s=1.0) as loader:

        async def code_of(content: str) -> str:
            try:
                await last_of(loader, ask(content))
            except Retryable as error:
                return error.code
            return ""

        hung = asyncio.create_task(code_of("!hang"))
        await asyncio.sleep(0)
        waited = await asyncio.gather(*(code_of("hi") for _ in range(3)))
        assert await hung == "suspect_request"
        assert waited == ["worker_lost"] * 3, "those are merely lost"


async def test_a_loader_that_the_daemon_ends_leaves_no_request_suspect() -> None:
    async with running() as loader:
        answers = loader.generate(ask("!hang"))
        while loader.silent_s < 1.5:  # it is in preparation, and for long
            assert isinstance(await anext(answers), Waits)
        loader.kill()
        with pytest.raises(Retryable) as caught:
            await last(answers)
        assert caught.value.code == "worker_lost"


async def test_a_request_that_kills_its_loader_at_once_is_no_suspect_yet() -> None:
    async with running() as loader:
        with pytest.raises(Retryable) as caught:
            await last_of(loader, ask("!crash"))
        assert caught.value.code == "loader_crashed", "as one that an outsider kills"


async def test_an_engine_that_raises_has_crashed_with_every_request_that_it_had() -> None:
    async with running("--fake-step-s", "0.05") as loader:
        other = loader.generate(ask("hi", max_tokens=1000))
        while not isinstance(await anext(other), Tokens):
            pass
        for answer in (await last_of(loader, ask("!raise")), await last(other)):
            assert isinstance(answer, Failed)
            assert (answer.code, answer.retryable) == ("loader_crashed", True)
        await loader.ended.wait()
        assert loader.cause == "exit 4"


@pytest.mark.parametrize("fails", ["TemporaryFile", "pwrite"])
async def test_a_loader_starts_on_a_full_disk(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile if fails == "TemporaryFile" else os, fails, full)
    async with running(stuck_s=2.0) as loader:
        assert isinstance(await last_of(loader, ask("hi")), Done)
        with pytest.raises(Retryable) as caught:
            await last_of(loader, ask("!hang"))
        assert caught.value.code == "worker_lost", "that it hangs is seen, and nobody is blamed"


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("", ""),
        ("\n \n", ""),
        ("memory allocation of 11811160064 bytes failed\nnote: run with `RUST_BACKTRACE=1`\n", "memory allocation of"),
        ("thread 'main' panicked at a.rs:1:2:\na table is full\nnote: run\n  = help: see\n", "a table is full"),
        ("Traceback (most recent call last):\n  File\nValueError: bad\n", "ValueError: bad"),
        ("note: that alone\n", "note: that alone"),
    ],
)
def test_the_line_that_tells_why_a_loader_ended_is_no_hint(stderr: str, expected: str) -> None:
    assert telling(stderr).startswith(expected)
    assert bool(telling(stderr)) == bool(expected)


async def test_a_flood_of_a_low_rank_is_no_queue_for_a_high_one_and_keeps_its_answers() -> None:
    """Eight times as many as there are rows; over a real socket, in a real loader."""
    low, high = Priority(rank=-1), Priority(rank=2)
    async with running("--rows", "4", "--fake-step-s", "0.005", "--fake-prefill-tps", "20000") as loader:
        alone = await said(loader, msgspec.structs.replace(ask("question 0", max_tokens=64), priority=low))
        ended: list[int] = []

        async def routine(number: int) -> str:
            text = await said(loader, msgspec.structs.replace(ask(f"question {number}", max_tokens=64), priority=low))
            ended.append(number)
            return text

        flood = [asyncio.create_task(routine(number)) for number in range(32)]
        while loader.throughput.workload.requests < 32 or not loader._last_s:
            await asyncio.sleep(0.01)
        for number in range(4):
            await said(loader, msgspec.structs.replace(ask(f"order {number}", max_tokens=2), priority=high))
        assert len(ended) <= 16, "in their turn they would follow all of it"
        texts = await asyncio.gather(*flood)
        assert sorted(ended) == list(range(32))
        assert texts[0] == alone, "though it may have yielded its row"


async def said(loader: LoaderProcess, request: Generate) -> str:
    return "".join([answer.text async for answer in loader.generate(request) if isinstance(answer, Tokens)])
