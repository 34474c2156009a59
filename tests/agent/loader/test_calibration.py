"""Calibration: what is timed next, what the fit recovers, and that nothing is timed while anybody waits."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.loader import calibration
from agent.loader import serve as serving
from agent.loader.calibration import Bounds, Calibration, Decode, Prefill, Task, Verify, fitted, rising
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
from agent.wire.step_times import TYPICAL_TOK, RowTimes, StepTimes

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
    assert {t.context_tok for t in seen if isinstance(t, Verify)} == {512}
    assert {Decode(rows, length) for rows in (1, 4) for length in (64, 512, 1_000, 2_000)} <= seen
    # eight rows of 2,000 tokens, the prompt and its copy are more than was planned for eight of 2,048
    assert max(t.context_tok for t in seen if isinstance(t, Decode) and t.rows == 8) == 1_524
    assert one.took_us < calibration.BUDGET_US
    assert times_of(one).steps == len(machine.done)


@pytest.mark.parametrize(
    ("kv_tok", "lengths"),
    [
        (8 * 2_560, (64, 512, 1_000, 2_000)),
        (8 * 2_048, (64, 512, 1_000, 1_524)),
        # 1,012 tokens would fit: as far from 1,000 as the noise
        (11_000, (64, 512, 1_000)),
        (8_000, (64, 512, 756)),
        (5_500, (64, 500)),
        (3_000, (64, 244)),
        (1_300, (44, 65)),
    ],
)
def test_where_the_memory_ends_before_the_next_length_it_is_timed_there(kv_tok: int, lengths: tuple[int, ...]) -> None:
    machine = Machine(1_000, 100, 0, 5_000, 100, 1)
    one, four, eight = times_of(run(machine, Bounds(8, kv_tok, 8_192, 512))).decode
    timed = {task.context_tok for task in machine.done if isinstance(task, Decode) and task.rows == 8}
    assert tuple(sorted(timed)) == lengths
    assert tuple(tokens for tokens, _ in eight.points)[: len(lengths)] == lengths
    assert eight.points[-1][0] == four.points[-1][0] == one.points[-1][0], "told as far as fewer rows reach"


def test_beyond_its_memory_a_row_count_grows_as_fewer_rows_do_by_their_number() -> None:
    """A jump between its own last two lengths is not carried on."""
    measured = {4: {512: 140.0, 1_000: 170.0, 2_000: 250.0}, 8: {512: 180.0, 1_000: 215.0, 1_500: 330.0}}
    four, eight = calibration._decode(measured)
    assert four.points == tuple(measured[4].items())
    assert eight.points == (*measured[8].items(), (2_000, pytest.approx(330 + 2 * (250 - 210))))
    assert calibration._decode({1: {64: 5.0}})[0].points == ((64, 5.0),)


@pytest.mark.parametrize("context_tok", [40, 700, 1_400, 1_600, 2_200, 8_192])
def test_a_short_context_is_timed_within_itself(context_tok: int) -> None:
    machine = Machine(1_000, 100, 0, 5_000, 100, 1)
    found = times_of(run(machine, USUAL._replace(context_tok=context_tok)))
    assert len(found.decode[0].points) == (1 if context_tok < 32 else 4 if context_tok > 1_750 else 3)
    assert found.context_tok <= min(2_000, context_tok)


class Bent(Machine):
    """A machine whose steps grow faster beyond 1,000 tokens, as those of the demo model do."""

    def us(self, task: Task) -> float:
        far = 0 if isinstance(task, Prefill) else max(0, task.context_tok - TYPICAL_TOK) * task.rows * 25.0
        return super().us(task) + far


def test_steps_that_grow_faster_with_the_length_are_told_where_they_were_measured_and_beyond() -> None:
    machine = Bent(1_000, 3_000, 0, 90_000, 1_300, 5)
    found = times_of(run(machine))
    for rows in (1, 4, 8):
        for context in (64, 500, 512, 1_000, 1_250, 1_524, 2_000, 4_000):
            assert found.step_us(rows, context) == pytest.approx(machine.us(Decode(rows, context)), rel=1e-6)


def first_round(one: Calibration, machine: Machine) -> set[Decode | Verify]:
    """Steps that were timed before the second prompt began, by an engine of which some steps only prepare others."""
    timed, last, number, began = set[Decode | Verify](), None, 0, False
    while (task := one.next()) is not None:
        us = machine.perform(task)
        if isinstance(task, Prefill):
            if began and not task.done_tok:
                return timed
            began = True
            one.learn(task, us, us)
            continue
        last, number = task, number + 1 if task == last else 1
        one.learn(task, us if number > calibration.UNTIMED else None, us)
        if number > calibration.UNTIMED:
            timed.add(task)
    return timed


@given(st.floats(0, 8_000), st.floats(100, 420_000))
@example(8_000, 420_000)
def test_all_lengths_are_timed_before_any_is_timed_again(token: float, base: float) -> None:
    """Also where a round of three samples of each kind would not fit into the budget."""
    machine, one = Machine(0, token, 0, base, 0, 0), Calibration(USUAL)
    kinds = first_round(one, machine)
    assert {t.context_tok for t in kinds if isinstance(t, Decode) and t.rows == 1} == {64, 512, 1_000, 2_000}
    assert {t.rows for t in kinds if t.context_tok == TYPICAL_TOK} == {1, 4, 8}
    assert one.took_us <= calibration.BUDGET_US + base


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


CURVE = ((64, 100.0), (512, 140.0), (1_000, 172.0), (1_524, 275.0))


@pytest.mark.parametrize(
    ("points", "context_tok", "us"),
    [
        *((CURVE, tokens, us) for tokens, us in CURVE),
        (CURVE, 756, 156.0),
        (CURVE, 2_048, 378.0),
        (CURVE, 0, 100 - 64 * 40 / 448),
        (((64, 10.0), (128, 100.0)), 0, 0.0),
        (((64, 10.0), (128, 100.0)), 60, 10 - 4 * 90 / 64),
        (((64, 50.0), (512, 50.0)), 9_000, 50.0),
        (((64, 50.0),), 1, 50.0),
        (((64, 50.0),), 9_000, 50.0),
        ((), 200, 7.0 + 0.5 * 200),
    ],
)
def test_a_step_between_and_beyond_the_lengths_that_were_timed(
    points: tuple[tuple[int, float], ...], context_tok: int, us: float
) -> None:
    one = RowTimes(rows=1, base_us=7.0, token_us=0.5, points=points)
    assert one.us(context_tok) == pytest.approx(us)
    assert StepTimes(prefill=(0.0, 1.0, 0.0), decode=(one,)).step_us(1, context_tok) == pytest.approx(us)


@pytest.mark.parametrize(
    ("measured", "points"),
    [
        ({}, ()),
        ({2_000: 9.0, 64: 3.0, 512: 5.0}, ((64, 3.0), (512, 5.0), (2_000, 9.0))),
        # disturbed at 512: neither its own length nor the longer ones take so long
        ({64: 3.0, 512: 8.0, 1_000: 5.0, 2_000: 9.0}, ((64, 3.0), (512, 5.0), (1_000, 5.0), (2_000, 9.0))),
        ({64: 9.0, 512: 8.0, 1_000: 7.0}, ((64, 7.0), (512, 7.0), (1_000, 7.0))),
    ],
)
def test_no_longer_context_is_cheaper(measured: dict[int, float], points: tuple[tuple[int, float], ...]) -> None:
    assert rising(measured) == points


MEASURED = st.dictionaries(st.integers(1, 1 << 20), st.floats(1e-3, 1e10), min_size=1, max_size=8)


@given(st.lists(MEASURED, min_size=1, max_size=3), st.lists(st.floats(0, 1e7), min_size=2, max_size=9))
def test_steps_pass_through_what_was_measured_and_never_fall_with_the_length(
    measured: list[dict[int, float]], lengths: list[float]
) -> None:
    decode = tuple(
        RowTimes(rows=rows, base_us=1.0, token_us=0.0, points=rising(one))
        for rows, one in zip((1, 4, 8), measured, strict=False)
    )
    times = StepTimes(prefill=(0.0, 1.0, 0.0), decode=decode)
    for one, of in zip(decode, measured, strict=True):
        for tokens, us in of.items():
            undisturbed = min(other for length, other in of.items() if length >= tokens)
            assert one.us(tokens) == pytest.approx(undisturbed)
            assert undisturbed <= us
    for rows in (1, 2.5, 4, 7, decode[-1].rows):
        if rows <= decode[-1].rows:
            told = [times.step_us(rows, length) for length in sorted(lengths)]
            assert min(told) >= 0
            assert all(a <= b * (1 + 1e-9) + 1e-3 for a, b in pairwise(told))
    assert msgspec.json.decode(msgspec.json.encode(times), type=StepTimes) == times
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(times), type=StepTimes) == times


@pytest.mark.parametrize(
    "points",
    [
        [[1_000, 906.4], [64, 1_000.0]],
        [[64, 906.4], [64, 1_000.0]],
        [[64, 906.4], [1_000, 900.0]],
        [[0, 906.4]],
        [[64, -906.4]],
        [[64, 1e300]],
        [[64.5, 906.4]],
        [[64]],
        [[n + 1, 9.0] for n in range(99)],
        None,
    ],
)
def test_impossible_points_are_rejected(points: object) -> None:
    told = msgspec.json.encode({"rows": 1, "base_us": 900.0, "token_us": 0.1, "points": points})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(told, type=RowTimes)


class _Former(msgspec.Struct, frozen=True, kw_only=True):
    """A row count's times as the version before knew them."""

    rows: int
    base_us: float
    token_us: float


def test_former_versions_read_them_and_are_read() -> None:
    line = _Former(rows=4, base_us=900.0, token_us=0.1)
    for form in (msgspec.json, msgspec.msgpack):
        now = form.decode(form.encode(line), type=RowTimes)
        assert (now.us(1_000), now.points) == (1_000.0, ())
        new = RowTimes(rows=4, base_us=900.0, token_us=0.1, points=CURVE)
        assert form.decode(form.encode(new), type=_Former) == line
    machine = Machine(1_000, 100, 0, 5_000, 100, 1)
    for one in times_of(run(machine)).decode:
        assert one.base_us + one.token_us * 700 == pytest.approx(machine.us(Decode(one.rows, 700)), rel=0.02)


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
