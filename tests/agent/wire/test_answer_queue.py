"""Answer frames in transit: ordered, complete and coalesced."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gateway.timed_reader import ReadTimeout, TimedReader
from agent.wire.answer_queue import TOGETHER, AnswerQueue
from agent.wire.frames import TOGETHER_S, Accepted, Answer, Decoder, Done, Frame, Together, Tokens, encode

DONE = Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=1)


def token(number: int) -> Tokens:
    return Tokens(id=1, text=f"w{number} ", count=1, ids=(number,))


def told(pieces: Sequence[Answer]) -> tuple[str, tuple[int, ...], int]:
    tokens = [one for one in pieces if isinstance(one, Tokens)]
    return (
        "".join(one.text for one in tokens),
        tuple(number for one in tokens for number in one.ids),
        sum(one.count for one in tokens),
    )


@given(st.lists(st.sampled_from(("put", "get", "other")), max_size=400))
def test_a_slow_reader_receives_everything_in_order(happened: list[str]) -> None:
    async def scenario() -> None:
        queue = AnswerQueue()
        sent: list[Answer] = []
        got: list[Answer] = []
        for n, what in enumerate(happened):
            if what == "get" and len(queue):
                taken = await queue.get()
                assert taken is not None
                got.append(taken)
            elif what != "get":
                piece: Answer = token(n) if what == "put" else Accepted(id=1, prompt_tok=n, cached_tok=0)
                sent.append(piece)
                queue.put(piece)
        queue.put(None)
        while (left := await queue.get()) is not None:
            got.append(left)
        assert told(got) == told(sent)
        assert [one for one in got if isinstance(one, Accepted)] == [one for one in sent if isinstance(one, Accepted)]

    asyncio.run(scenario())


async def test_pending_tokens_are_coalesced() -> None:
    queue = AnswerQueue()
    for n in range(10_000):
        queue.put(token(n))
    assert len(queue) <= 10_000 // TOGETHER + TOGETHER
    queue.put(DONE)
    got = []
    while not isinstance(piece := await queue.get(), Done):
        assert piece is not None
        got.append(piece)
    assert told(got)[1] == tuple(range(10_000))


async def test_a_waiting_reader_is_woken_and_may_return_after_leaving() -> None:
    queue = AnswerQueue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    again = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put(token(1))
    assert await again == token(1)


def test_a_non_streamed_answer_needs_few_frames_and_starts_at_once() -> None:
    together = Together()
    sent: list[Answer] = []
    for n in range(100):
        sent += together.put(token(n), n * TOGETHER_S / 20)
        if n == 0:
            assert sent == [token(0)]
    sent += together.put(DONE, 100.0)
    assert told(sent) == told([token(n) for n in range(100)])
    assert len(sent) <= 1 + 5 + 1 + 1
    assert sent[-1] == DONE


@given(st.integers(0, 60), st.integers(1, 50))
def test_frames_are_decoded_whatever_the_chunk_boundaries(count: int, size: int) -> None:
    frames: list[Answer] = [Accepted(id=1, prompt_tok=3, cached_tok=0), *(token(n) for n in range(count)), DONE]
    stream = b"".join(encode(one) for one in frames)
    decoder = Decoder()
    found: list[Frame] = []
    for at in range(0, len(stream), size):
        found += decoder.feed(stream[at : at + size])
    assert found == frames


async def test_the_stall_timeout_restarts_with_each_frame() -> None:
    async def source() -> AsyncIterator[int]:
        for n in range(3):
            await asyncio.sleep(0.05)
            yield n
        await asyncio.sleep(30)

    patience: TimedReader[int] = TimedReader(source())
    with patience:
        for n in range(3):
            assert await patience.next(0.2) == n
        with pytest.raises(ReadTimeout):
            await patience.next(0.1)


async def test_a_cancelled_wait_is_not_a_stall() -> None:
    async def source() -> AsyncIterator[int]:
        await asyncio.sleep(30)
        yield 1

    patience: TimedReader[int] = TimedReader(source())
    with patience:
        waiting = asyncio.create_task(patience.next(10.0))
        await asyncio.sleep(0.01)
        waiting.cancel()
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError)
