"""Whose prompt a loader prepares next, and how long it is without progress."""

import errno
import os
import queue
import signal
import threading
from collections import Counter
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader.fake_engine import FakeEngine
from agent.loader.generation import Prepared
from agent.loader.serve import Inbox, _prepare
from agent.process.preparation import AHEAD_BYTES, PreparationLine, size_bytes
from agent.process.watch import STALLED_S, STEP_S, Watch
from agent.wire.frames import CRASHED, SUSPECT, Ask, Embed, Generate, Message, ToolCall
from agent.wire.priority import Priority
from agent.wire.progress import Prepares, Progress

MB = 1 << 20


def order(line: PreparationLine) -> list[int]:
    """The order in which everything that waits is prepared, one after the other."""
    found = []
    while (number := line.next()) is not None:
        found.append(number)
        line.leave(number)
    return found


def test_one_keys_large_prompts_delay_anothers_short_one_by_the_one_in_preparation_only() -> None:
    line = PreparationLine()
    for number in range(48):
        assert line.add(number, "alice", 5 * MB) == []
    assert line.next() == 0
    assert line.next() is None, "one large prompt at a time"
    line.add(48, "bob", 1000)
    assert line.next() == 48, "a short one is sent ahead"
    assert line.next() is None
    line.leave(0)
    line.leave(48)
    assert line.next() == 1


def test_keys_take_turns_by_what_they_had() -> None:
    line = PreparationLine()
    for number in range(6):
        line.add(number, "a", 100)
    for number in range(6, 8):
        line.add(number, "b", 300)
    assert order(line) == [0, 1, 2, 6, 3, 4, 5, 7]


def test_small_ones_pass_a_large_one_of_their_key_for_a_while_only() -> None:
    line = PreparationLine()
    line.add(0, "a", 1000)
    line.add(1, "a", 50)
    served, number = [], 2
    while 0 not in served:
        line.add(number, "a", 100)
        served.append(line.next())
        line.leave(served[-1] or 0)
        number += 1
    assert served[0] == 1
    assert 5 < len(served) < 15


def test_what_waits_is_bounded_and_the_greediest_pays() -> None:
    line = PreparationLine(waiting_bytes=100)
    assert [line.add(n, "alice", 30) for n in range(3)] == [[], [], []]
    assert line.add(3, "bob", 20) == [2], "not the one who came last, but the key that holds most"
    assert line.add(4, "alice", 90) == [4]
    assert order(line) == [3, 0, 1]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.integers(0, 3)), max_size=60),
    st.integers(0, 300),
)
def test_every_request_gets_its_turn_once_and_little_is_sent_ahead(
    asked: list[tuple[str, int, int]], ahead: int
) -> None:
    line = PreparationLine(ahead_bytes=ahead)
    sizes: dict[int, int] = {}
    sent: list[int] = []
    served: Counter[int] = Counter()

    def take() -> None:
        while (number := line.next()) is not None:
            sent.append(number)
            served[number] += 1
            held = [sizes[one] for one in sent]
            assert sum(held) - max(held) <= ahead

    for number, (key, size, done) in enumerate(asked):
        sizes[number] = size
        assert line.add(number, key, size) == []
        take()
        for _ in range(min(done, len(sent))):
            line.leave(sent.pop(0))
            take()
    while sent:
        line.leave(sent.pop(0))
        take()
    assert served == Counter(range(len(asked)))
    assert line.waiting == []


def test_every_text_of_a_request_counts_towards_its_size() -> None:
    call = ToolCall(id="1", name="f", arguments="x" * 300)
    whole = Generate(
        id=1,
        model="m",
        max_tokens=1,
        messages=(Message(role="user", content="x" * 1000, reasoning="y" * 100, calls=(call,)),),
        tools=("z" * 50,),
        schema="s" * 20,
    )
    bare = size_bytes(Generate(id=1, model="m", max_tokens=1))
    assert size_bytes(whole) - bare == 1470
    assert size_bytes(Embed(id=1, model="m", inputs=("x" * 700, (1, 2, 3)))) - bare == 703


class Told:
    """A watch, its loader's end of the file, and a clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        ours = Progress()
        self.loader = Progress(os.dup(ours.fd))
        self.watch = Watch(ours, lambda: self.now_s)

    def send(self, number: int) -> None:
        self.watch.add(number, "", 10)
        assert self.watch.next() == number


def test_a_request_that_waits_behind_another_ages_nothing() -> None:
    told = Told()
    told.send(1)
    told.send(2)
    told.loader.begin(1)
    for _ in range(100):
        told.now_s += 1.0
        told.loader.advance()
        assert told.watch.silent_s == 0.0
    assert told.watch.waiting == [1, 2]
    told.now_s += STALLED_S
    assert told.watch.silent_s == STALLED_S, "the thread hangs at it"
    assert told.watch.waiting == [1], "the others may go elsewhere"
    told.loader.end()
    assert told.watch.silent_s == 0.0


def test_a_hung_preparation_is_seen_while_the_engine_goes_on_and_after_its_client_left() -> None:
    told = Told()
    told.send(1)
    told.send(2)
    told.watch.accepted(1)
    told.loader.begin(2)
    assert told.watch.silent_s == 0.0
    for _ in range(60):
        told.now_s += 1.0
        told.watch.heard()
    assert told.watch.silent_s == 60.0
    assert told.watch.left(2)
    assert told.watch.silent_s == 60.0


def test_clients_that_leave_a_silent_loader_do_not_hide_it() -> None:
    told = Told()
    for number in range(5):
        told.send(number)
        told.now_s += 15.0
        assert told.watch.left(number)
        assert told.watch.silent_s == 15.0 * (number + 1)
    told.watch.heard()
    assert told.watch.silent_s == 0.0
    told.now_s += 1000.0
    assert told.watch.silent_s == 0.0, "an idle one owes nothing"
    told.send(9)
    assert told.watch.silent_s == 0.0


def test_new_requests_do_not_hide_a_main_thread_that_hangs() -> None:
    """Each is prepared, waits for the engine, and is given up by its client."""
    told = Told()
    told.send(1)
    told.loader.begin(1)
    told.loader.end()
    told.watch.heard()
    told.watch.accepted(1)
    for number in range(2, 60):
        told.send(number)
        told.loader.begin(number)
        told.now_s += 20.0
        assert told.watch.silent_s == 20.0 * (number - 1)
        told.loader.end()
        assert told.watch.silent_s == 20.0 * (number - 1)
        assert told.watch.left(number)
    assert told.watch.stuck(60.0)
    told.watch.ended("why", KILLED, ours=False)
    assert told.watch.loss(1).code == SUSPECT


def test_a_main_thread_owes_nothing_while_the_oldest_request_is_prepared() -> None:
    told = Told()
    for number in (1, 2, 3):
        told.send(number)
    told.loader.begin(1)
    for _ in range(100):
        told.now_s += 1.0
        told.loader.advance()
        assert told.watch.silent_s == 0.0
    told.loader.begin(2)
    assert told.watch.silent_s == 0.0
    for second in range(1, 100):
        told.now_s += 1.0
        told.loader.advance()
        assert told.watch.silent_s == second, "the first is prepared, and nothing was heard of it"
    told.watch.heard()
    told.watch.accepted(1)
    assert told.watch.silent_s == 0.0
    told.now_s += 10.0
    told.loader.advance()
    assert told.watch.silent_s == 10.0
    told.watch.heard()
    told.watch.done(1)
    told.now_s += 10.0
    told.loader.advance()
    assert told.watch.silent_s == 0.0, "it has nothing to do but to wait for the second"


def test_what_waits_is_told_so_while_the_engine_is_in_a_long_step() -> None:
    told = Told()
    for number, size in ((1, 10), (2, 10), (3, AHEAD_BYTES), (4, AHEAD_BYTES)):
        told.watch.add(number, "", size)
    assert [told.watch.next() for _ in range(4)] == [1, 2, 3, None]
    for number in (1, 2, 3):
        told.loader.begin(number)
    told.loader.end()
    told.watch.heard()
    told.watch.accepted(1)
    for _ in range(int(STEP_S) - 1):
        told.now_s += 1.0
        assert sorted(told.watch.waiting) == [2, 3, 4], "prepared, and not sent yet"
    told.now_s += 1.0
    assert told.watch.waiting == [], "they may go elsewhere"
    told.watch.heard()
    assert sorted(told.watch.waiting) == [2, 3, 4]


KILLED = -signal.SIGKILL


@pytest.mark.parametrize(("long_s", "code"), [(0.0, CRASHED), (5.0, SUSPECT)])
def test_what_the_loader_prepared_when_it_was_killed_is_known(long_s: float, code: str) -> None:
    told = Told()
    told.send(1)
    told.send(2)
    told.loader.begin(1)
    assert told.watch.waiting == [1, 2]
    told.now_s += long_s
    told.loader.advance()
    told.watch.ended("why", KILLED, ours=False)
    assert told.watch.loss(1).code == code
    assert told.watch.loss(2).code == "worker_lost"


@pytest.mark.parametrize("hangs", ["preparing", "main"])
def test_only_requests_of_the_thread_that_stood_still_are_suspect(hangs: str) -> None:
    told = Told()
    told.send(1)
    told.send(2)
    told.loader.begin(2)
    told.watch.accepted(1)
    for _ in range(61):
        assert not told.watch.stuck(60.0)
        told.now_s += 1.0
        if hangs == "main":
            told.loader.advance()
        else:
            told.watch.heard()
    assert told.watch.stuck(60.0)
    told.watch.ended("why", KILLED, ours=False)
    found = {number: told.watch.loss(number).code for number in (1, 2)}
    assert found == ({1: "worker_lost", 2: SUSPECT} if hangs == "preparing" else {1: SUSPECT, 2: "worker_lost"})


def test_a_loader_that_the_daemon_ends_has_no_suspects() -> None:
    told = Told()
    told.send(1)
    told.loader.begin(1)
    assert told.watch.silent_s == 0.0
    told.now_s += 30.0
    told.watch.ended("why", KILLED, ours=True)
    assert told.watch.loss(1).code == "worker_lost"


def test_progress_is_told_through_the_file() -> None:
    ours = Progress()
    theirs = Progress(os.dup(ours.fd))
    assert ours.read() == Prepares()
    theirs.begin(7)
    theirs.advance()
    assert ours.read() == Prepares(7, 2)
    theirs.end()
    assert ours.read() == Prepares(0, 3)
    theirs.close()
    ours.close()


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_told_on_a_full_disk_is_no_old_word(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Progress()
    theirs = Progress(os.dup(ours.fd))
    theirs.begin(7)
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full)
        theirs.end()
        assert ours.read() == Prepares()
        theirs.begin(8)
    theirs.advance()
    assert ours.read() == Prepares(8, 4), "there is room again"
    theirs.close()
    ours.close()


def test_requests_are_prepared_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    monkeypatch.setattr(os, "pwrite", full)
    asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_prepare, args=(FakeEngine(), asked, inbox, progress, set()), daemon=True).start()
    for number in (1, 2):
        asked.put(Generate(id=number, model="m", prompt="hi", max_tokens=1))
        found = inbox.get(timeout=60)
        assert isinstance(found, Prepared)
        assert found.request.id == number


ROUTINE, ORCHESTRATION = Priority(rank=-1, starve_ms=3000), Priority(rank=2)


def test_a_higher_rank_is_prepared_before_lower_ones_of_any_key_and_size() -> None:
    line = PreparationLine(ahead_bytes=0)
    for number in range(4):
        line.add(number, "a", 10, ROUTINE)
    line.add(4, "a", 5000, ORCHESTRATION)
    line.add(5, "b", 100)
    line.add(6, "b", 9000, ORCHESTRATION)
    assert order(line) == [4, 6, 5, 0, 1, 2, 3]


def test_a_lower_rank_waits_for_higher_ones_as_long_as_it_may() -> None:
    line = PreparationLine(ahead_bytes=0)
    line.add(0, "a", 10, ROUTINE, 0.0)
    sent = []
    for number in range(1, 9):
        line.add(number, "b", 10, ORCHESTRATION, float(number - 1))
        sent.append(line.next(float(number - 1)))
        line.leave(sent[-1] or 0)
    assert sent == [1, 2, 3, 0, 4, 5, 6, 7], "after three seconds it is the next"


def test_too_much_text_costs_the_lowest_rank_its_place() -> None:
    line = PreparationLine(waiting_bytes=100)
    assert line.add(0, "a", 60, ORCHESTRATION) == []
    assert line.add(1, "b", 30, ROUTINE) == []
    assert line.add(2, "a", 40, ORCHESTRATION) == [1], "though another key holds more"
    assert line.add(3, "b", 10, ROUTINE) == [3]


arriving = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1000), st.sampled_from([-1, 0, 2])), max_size=40)


@given(arriving, st.integers(0, 2000))
def test_each_prompt_is_prepared_once_the_highest_rank_first(asked: list[tuple[str, int, int]], ahead: int) -> None:
    line = PreparationLine(ahead_bytes=ahead)
    for number, (key, size, rank) in enumerate(asked):
        line.add(number, key, size, Priority(rank=rank))
    found = order(line)
    assert sorted(found) == list(range(len(asked)))
    ranks = [asked[number][2] for number in found]
    assert ranks == sorted(ranks, reverse=True)
    for rank in (-1, 0, 2):
        alone = PreparationLine(ahead_bytes=ahead)
        for number, (key, size, its) in enumerate(asked):
            if its == rank:
                alone.add(number, key, size)
        assert order(alone) == [number for number in found if asked[number][2] == rank], "as if there were no others"
