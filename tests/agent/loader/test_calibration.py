"""Calibration: what is timed next, what the fit recovers, and that nothing is timed while anybody waits."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loader import calibration
from agent.loader import serve as serving
from agent.loader.calibration import Bounds, Calibration, Decode, Prefill, Task, Verify, fitted
from agent.loader.fake_engine import FakeEngine, Pretence
from agent.loader.generation import Advance, Prepared, nothing
from agent.loader.serve import serve
from agent.wire.frames import (
    Accepted,
    Ask,
    Calibrate,
    Calibrated,
    Decoder,
    Done,
    Failed,
    Frame,
    Generate,
    Message,
    Ready,
    Relieve,
    Report,
    Reported,
    Stop,
    encode,
)
from agent.wire.progress import Progress
from agent.wire.step_times import RowTimes, StepTimes

LIMIT_S = 60.0
USUAL = Bounds(rows=8, kv_tok=8 * 2048, context_tok=8192, chunk_tok=512)


class Machine:
    """A pretended machine: what each task takes there, and what of the prompt it holds."""

    def __init__(self, chunk: float, token: float, pair: float, base: float, row: float, seen: float) -> None:
        self.prefill, self.decode = (chunk, token, pair), (base, row, seen)
        self.held_tok = 0
        self.done: list[Task] = []

    def us(self, task: Task) -> float:
        base, row, seen = self.decode
        if isinstance(task, Prefill):
            chunk, token, pair = self.prefill
            return chunk + token * task.tokens + pair * task.tokens * (task.done_tok + task.tokens / 2)
        wide = task.rows * (task.tokens if isinstance(task, Verify) else 1)
        return base + row * wide + seen * wide * task.context_tok

    def perform(self, task: Task) -> float:
        """Takes a task only in the state that it needs."""
        if isinstance(task, Prefill):
            assert task.done_tok in (0, self.held_tok)
            self.held_tok = task.done_tok + task.tokens
        else:
            assert task.context_tok == self.held_tok
        self.done.append(task)
        return self.us(task)


def run(machine: Machine, bounds: Bounds = USUAL, rest_after: frozenset[int] = frozenset()) -> Calibration:
    one = Calibration(bounds)
    for number in range(5_000):
        if (task := one.next()) is None:
            return one
        us = machine.perform(task)
        one.learn(task, us, us)
        if number in rest_after:
            one.rest()
            machine.held_tok = 0
    raise AssertionError("it does not end")


def times_of(one: Calibration) -> StepTimes:
    found = one.times()
    assert found is not None
    return found


@given(
    st.floats(0, 20_000), st.floats(10, 3_000), st.floats(0, 0.3),
    st.floats(500, 60_000), st.floats(0, 5_000), st.floats(0, 5),
    st.frozensets(st.integers(0, 150), max_size=5),
)  # fmt: skip
def test_known_costs_are_recovered_wherever_requests_interrupt(
    chunk: float, token: float, pair: float, base: float, row: float, seen: float, rest_after: frozenset[int]
) -> None:
    machine = Machine(chunk, token, pair, base, row, seen)
    found = times_of(run(machine, rest_after=rest_after))
    for rows in (1, 2, 4, 6, 8, 12):
        for context in (64, 700, 2_000):
            assert found.step_us(rows, context) == pytest.approx(machine.us(Decode(rows, context)), rel=0.02)
    for tokens, done in ((64, 0), (400, 0), (512, 1_000)):
        assert found.prefill_us(tokens, done) == pytest.approx(machine.us(Prefill(tokens, done)), rel=0.03)
    for rows in (1, 2):
        for tokens in (2, 4, 8):
            if (us := found.verify_us(rows, tokens)) is not None:
                assert us == machine.us(Verify(rows, tokens, 512))
    assert found.verify_us(3, 2) is None


@given(
    st.integers(1, 64), st.integers(16, 40_000), st.integers(16, 300_000), st.integers(32, 4_096),
    st.floats(1, 300_000), st.floats(1, 9_000_000),
)  # fmt: skip
def test_it_ends_within_its_budget_and_its_memory_on_any_engine(
    rows: int, kv_tok: int, context_tok: int, chunk_tok: int, token: float, base: float
) -> None:
    """The prompt, one copy of it and the batch are in memory at a time; the last step may exceed the budget."""
    machine = Machine(0.0, token, 0.0, base, 0.0, 0.0)
    one = run(machine, Bounds(rows, kv_tok, context_tok, chunk_tok))
    longest = max(machine.us(task) for task in machine.done)
    assert one.took_us <= calibration.BUDGET_US + longest
    for task in machine.done:
        if not isinstance(task, Prefill):
            assert task.rows <= rows
            assert task.context_tok + 8 <= max(16, context_tok)
            assert (task.rows + 2) * task.context_tok <= max(kv_tok, 16 * (task.rows + 2))
        else:
            assert task.tokens <= chunk_tok


def test_a_usual_engine_is_timed_at_the_promised_points() -> None:
    machine = Machine(1_000, 100, 0, 5_000, 100, 1)
    one = run(machine)
    seen = set(machine.done)
    assert {Verify(r, t, 512) for r in (1, 2) for t in (2, 4, 8)} <= seen
    assert {t.rows for t in seen if isinstance(t, Decode)} == {1, 4, 8}
    assert {Decode(rows, length) for rows in (1, 4) for length in (64, 512, 2_000)} <= seen
    # eight rows of 2,000 tokens, the prompt and its copy are more than was planned for eight of 2,048
    assert max(t.context_tok for t in seen if isinstance(t, Decode) and t.rows == 8) == 1_524
    assert one.took_us < calibration.BUDGET_US
    assert times_of(one).steps == len(machine.done)


def test_a_slow_model_is_timed_at_shorter_lengths() -> None:
    machine = Machine(0, 50_000, 0, 200_000, 0, 0)  # 20 tokens/s
    one = run(machine)
    assert {t.context_tok for t in machine.done if isinstance(t, Decode)} == {64}
    assert times_of(one).step_us(8, 64) == pytest.approx(200_000)


def test_steps_that_take_no_time_end_too() -> None:
    assert times_of(run(Machine(0, 0, 0, 0, 0, 0))).step_us(8, 1_000) < 1


def test_a_model_that_is_too_slow_says_nothing() -> None:
    machine = Machine(0, 1_000_000, 0, 200_000, 0, 0)
    assert run(machine).times() is None


def test_a_disturbed_round_does_not_count() -> None:
    machine, one, number = Machine(0, 100, 0, 5_000, 500, 1), Calibration(USUAL), 0
    calm = machine.us(Decode(4, 512))
    while (task := one.next()) is not None:
        disturbed = 40 <= number < 60
        us = machine.perform(task) * (4 if disturbed else 1)
        one.learn(task, us, us)
        number += 1
    assert times_of(one).step_us(4, 512) == pytest.approx(calm, rel=0.01)


def test_steps_that_only_prepare_count_as_spent_and_not_as_timed() -> None:
    one = Calibration(USUAL)
    one.learn(Prefill(64, 0), 6_400, 6_400)
    assert one.next() == Decode(1, 64)
    for _ in range(3):
        one.learn(Decode(1, 64), None, 1_000)
        assert one.next() == Decode(1, 64)
    assert one.took_us == 9_400


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([((1.0, 10.0), 30.0), ((1.0, 20.0), 50.0)], (10.0, 2.0)),
        ([((1.0, 10.0), 50.0), ((1.0, 20.0), 50.0), ((1.0, 30.0), 50.0)], (50.0, 0.0)),
        ([((1.0, 10.0), 10.0), ((1.0, 20.0), 30.0)], (0.0, 1.2)),  # a line through these begins below 0
        ([((1.0, 10.0), 30.0)], (30.0, 0.0)),
    ],
)
def test_a_fit_has_no_coefficient_below_zero(
    points: list[tuple[tuple[float, ...], float]], expected: tuple[float, ...]
) -> None:
    assert fitted(points) == pytest.approx(expected, abs=0.2)


def test_steps_between_and_beyond_the_rows_that_were_timed() -> None:
    rows = tuple(RowTimes(rows=r, base_us=us, token_us=0.0) for r, us in ((1, 100.0), (4, 130.0), (8, 230.0)))
    times = StepTimes(prefill=(0.0, 1.0, 0.0), decode=rows)
    assert [times.step_us(r, 500) for r in (1, 2, 4, 6, 8, 16)] == [100, 110, 130, 180, 230, 430]
    assert times.gap_us(8) * (1 + times.crowd(8) / 8) == pytest.approx(100, abs=1)
    assert times.gap_us(8) * (1 + times.crowd(8)) == pytest.approx(230, abs=2)
    assert times.prompt_us(1_000, 512) == 1_000
    assert times.prefill_tps(512) == pytest.approx(1e6)


@given(st.floats(1, 1e6), st.floats(1, 200), st.integers(1, 64))
def test_what_routing_reads_is_finite_whatever_was_measured(step: float, growth: float, rows: int) -> None:
    decode = (RowTimes(rows=1, base_us=step, token_us=0), RowTimes(rows=8, base_us=step * growth, token_us=0))
    times = StepTimes(prefill=(0.0, 0.0, 0.0), decode=decode)
    assert 0 <= times.crowd(rows) <= 64
    assert 0 <= times.gap_us(rows) <= step + 1
    assert times.prefill_tps(512) > 0


# ---- in the loader's loop ----


# Five seconds after the daemon has gone a loader exits, which here is the process of the tests, with status 0. The
# loader's thread may see the end of its socket after the test, so this is never undone.
serving._ORPHAN_GRACE_S = 1e6


class Gated(FakeEngine):
    """Performs a timed step only when it is let, and notes what is called."""

    def __init__(self) -> None:
        super().__init__(Pretence(step_s=0.0001, prefill_tps=1e6))
        self.entered: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self.let = threading.Semaphore(0)
        self.preparing, self.prepare_on = threading.Event(), threading.Event()
        self.prepare_on.set()
        self.calls: list[str] = []

    def measure(self, task: Task) -> float:
        self.entered.put(task)
        assert self.let.acquire(timeout=LIMIT_S)
        self.calls.append("measure")
        return super().measure(task)

    def rest(self) -> None:
        self.calls.append("rest")

    def prepare(self, request: Ask, advance: Advance = nothing) -> Prepared | Failed:
        self.preparing.set()
        assert self.prepare_on.wait(LIMIT_S)
        return super().prepare(request, advance)

    def submit(self, prepared: Prepared) -> Frame:
        self.calls.append("submit")
        return super().submit(prepared)


class Daemon:
    """The other end of a loader's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._decoder, self._frames = sock, Decoder(), list[Frame]()
        sock.settimeout(LIMIT_S)

    def send(self, *frames: Frame) -> None:
        self._sock.sendall(b"".join(map(encode, frames)))

    def until(self, kind: type[Frame]) -> list[Frame]:
        """Frames up to one of a kind."""
        seen: list[Frame] = []
        while not (seen and isinstance(seen[-1], kind)):
            while not self._frames:
                self._frames = self._decoder.feed(self._sock.recv(1 << 16))
            seen.append(self._frames.pop(0))
        return seen


@contextmanager
def loader(engine: FakeEngine) -> Iterator[Daemon]:
    ours, theirs = socket.socketpair()
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(serve(theirs, lambda: engine, Progress(None))), daemon=True)
    thread.start()
    daemon = Daemon(ours)
    try:
        daemon.until(Ready)
        yield daemon
        daemon.send(Stop())
        thread.join(LIMIT_S)
        assert status == [0]
    finally:
        ours.close()
        thread.join(LIMIT_S)
        theirs.close()


def ask(number: int) -> Generate:
    return Generate(id=number, model="m", messages=(Message(role="user", content="hello"),), max_tokens=3)


def finish(engine: Gated, daemon: Daemon) -> Calibrated:
    """Allow it, let everything go on, and return the figures."""
    daemon.send(Calibrate(go=True))
    for _ in range(2_000):
        engine.let.release()
    (*_, last) = daemon.until(Calibrated)
    assert isinstance(last, Calibrated)
    return last


def test_a_request_waits_for_no_more_than_the_step_that_runs_and_it_goes_on_later() -> None:
    engine = Gated()
    with loader(engine) as daemon:
        daemon.send(Calibrate(go=True))
        engine.entered.get(timeout=LIMIT_S)  # in a step
        engine.let.release()
        engine.entered.get(timeout=LIMIT_S)  # and in the next one
        daemon.send(ask(1))
        assert engine.preparing.wait(LIMIT_S)  # it has arrived
        engine.let.release()
        daemon.until(Done)
        assert engine.calls == ["measure", "measure", "rest", "submit"]
        # and it is not resumed by itself, nor before the daemon says so
        daemon.send(Report())
        (*_, report) = daemon.until(Reported)
        assert engine.calls[-1] == "submit"
        assert isinstance(report, Reported)
        assert report.steps <= 4, "timed steps are no work"
        found = finish(engine, daemon)
        assert found.times is not None
        assert found.times.step_us(4, 500) == pytest.approx(100)
        assert engine.calls.count("measure") == found.times.steps
        assert engine.calls[-1] == "rest"


def test_nothing_is_timed_while_a_request_is_prepared() -> None:
    engine = Gated()
    engine.prepare_on.clear()
    with loader(engine) as daemon:
        daemon.send(ask(1))
        assert engine.preparing.wait(LIMIT_S)
        daemon.send(Calibrate(go=True), Report())
        daemon.until(Reported)  # it has read that it may
        assert engine.entered.empty()
        engine.prepare_on.set()
        daemon.until(Done)
        assert "measure" not in engine.calls


@pytest.mark.parametrize("frame", [Calibrate(go=False), Relieve(level="soft"), Relieve(level="hard")])
def test_it_gives_back_its_memory_when_told(frame: Frame) -> None:
    engine = Gated()
    with loader(engine) as daemon:
        daemon.send(Calibrate(go=True))
        engine.entered.get(timeout=LIMIT_S)
        daemon.send(frame, Report())
        engine.let.release()
        # a step more may have been begun before the frame was there
        for _ in range(3):
            engine.let.release()
        daemon.until(Reported)
        assert engine.calls[-1] == "rest"
        assert engine.calls.count("measure") <= 4


def test_a_report_does_not_interrupt_it() -> None:
    engine = Gated()
    with loader(engine) as daemon:
        daemon.send(Calibrate(go=True), Report())
        for _ in range(5):
            engine.let.release()
        daemon.until(Reported)
        daemon.send(Report())
        for _ in range(5):
            engine.let.release()
        daemon.until(Reported)
        assert "rest" not in engine.calls
        daemon.send(Calibrate(go=False))
        for _ in range(100):
            engine.let.release()


def test_a_model_that_cannot_be_timed_serves_all_the_same() -> None:
    class Unusual(Gated):
        def measure(self, task: Task) -> float:
            raise ValueError("no batching with history")

    with loader(Unusual()) as daemon:
        daemon.send(Calibrate(go=True))
        (*_, last) = daemon.until(Calibrated)
        assert last == Calibrated(problem="ValueError")
        daemon.send(Calibrate(go=True), ask(1))
        assert any(isinstance(frame, Accepted) for frame in daemon.until(Done))


def test_figures_that_cannot_be_made_of_what_was_timed_do_not_end_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(_: Calibration) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Calibration, "times", impossible)
    engine = Gated()
    engine.let.release(10_000)
    with loader(engine) as daemon:
        daemon.send(Calibrate(go=True))
        (*_, last) = daemon.until(Calibrated)
        assert last == Calibrated(problem="ZeroDivisionError")
        daemon.send(ask(1))
        assert any(isinstance(frame, Accepted) for frame in daemon.until(Done))


def test_the_loader_ends_while_it_is_timed() -> None:
    engine = Gated()
    with loader(engine) as daemon:
        daemon.send(Calibrate(go=True))
        engine.entered.get(timeout=LIMIT_S)
        daemon.send(Stop())
        for _ in range(5):
            engine.let.release()
    assert engine.calls.count("measure") <= 5
