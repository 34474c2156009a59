"""The life cycle of a model: one loader outside a swap, every effect once, and a settled state after any history."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models import lifecycle
from agent.models.lifecycle import (
    AGAIN_S,
    CRASHES_BEFORE_GIVING_UP,
    Close,
    Effect,
    Event,
    Evict,
    Exited,
    Fault,
    Flipped,
    Idle,
    Life,
    Load,
    Planned,
    Retired,
    Started,
    StartFailed,
    step,
)

UP, QUIET = Started(attempt=1, version="v1"), Load(retries=True)


def play(*events: Event, now_s: float = 0.0) -> tuple[Life, list[Effect]]:
    life, effects = Life(), list[Effect]()
    for event in events:
        life, more = step(life, event, now_s)
        effects += more
    return life, effects


def failed(attempt: int, fault: Fault) -> StartFailed:
    return StartFailed(attempt=attempt, fault=fault, reason="why")


CASES: list[tuple[tuple[Event, ...], str, list[Effect] | None]] = [
    ((Load(),), "loading", ["start"]),
    ((Load(), Load()), "loading", ["start"]),
    ((Load(), UP), "ready", ["start", "serve"]),
    ((Load(), UP, Load()), "ready", ["start", "serve"]),
    ((Load(), failed(1, "no_room")), "cold", ["start"]),
    ((Load(), failed(1, "cancelled")), "cold", ["start"]),
    ((Load(), failed(1, "unusable")), "failed", ["start"]),
    ((Load(), failed(1, "died")), "failed", ["start"]),
    ((QUIET, failed(1, "died")), "backing_off", ["start", "wake"]),
    ((QUIET, failed(1, "died"), Load(), failed(2, "died")), "backing_off", ["start", "wake", "start", "wake"]),
    ((QUIET, failed(1, "died"), "due"), "loading", ["start", "wake", "start"]),
    ((Load(), UP, Evict(reason="ordered")), "draining", ["start", "serve", "retire"]),
    ((Load(), UP, Evict(reason="ordered"), Retired(loader=1)), "cold", ["start", "serve", "retire"]),
    ((Load(), UP, Evict(reason="ordered"), Retired(loader=7)), "draining", ["start", "serve", "retire"]),
    ((Load(), UP, Evict(reason="ordered"), "claim"), "draining", ["start", "serve", "retire"]),
    ((Load(), UP, Idle(idle_s=9.0, keep_alive_s=10.0)), "ready", ["start", "serve"]),
    ((Load(), UP, Idle(idle_s=10.0, keep_alive_s=10.0)), "draining", ["start", "serve", "retire"]),
    ((Load(), UP, Idle(idle_s=10.0, keep_alive_s=-1.0)), "ready", ["start", "serve"]),
    ((Load(), UP, Exited(loader=1, cause="x")), "backing_off", ["start", "serve", "crashed", "wake"]),
    ((Load(), UP, Exited(loader=1, cause="x"), "due"), "loading", ["start", "serve", "crashed", "wake", "start"]),
    ((Load(), UP, Exited(loader=1, cause="x"), Load()), "loading", ["start", "serve", "crashed", "wake", "start"]),
    ((Load(), UP, Exited(loader=3, cause="x")), "ready", ["start", "serve"]),
    ((Load(), UP, "claim", Evict(reason="memory")), "ready", ["start", "serve"]),
    ((Load(), UP, "claim", Flipped(version="v2"), "release"), "ready", ["start", "serve", "serve"]),
    ((Load(), UP, "claim", "leave_rotation", "withdraw", "release"), "backing_off", ["start", "serve", "wake"]),
    ((Load(), UP, "claim", "leave_rotation", Exited(loader=1, cause="x")), "draining", ["start", "serve", "crashed"]),
    (
        (Load(), UP, "claim", Exited(loader=1, cause="x"), "due", Flipped(version="v2")),
        "ready",
        ["start", "serve", "crashed", "wake", "start", "serve"],
    ),
    (
        (
            *(Load(), UP, "claim", Exited(loader=1, cause="x"), "due", Flipped(version="v2")),
            Started(attempt=2, version="v1"),
        ),
        "ready",
        ["start", "serve", "crashed", "wake", "start", "serve", "kill"],
    ),
    ((Load(), UP, "claim", Exited(loader=1, cause="x"), "due", "release"), "loading", None),
    (("reserve", Load(), "release", Load()), "loading", ["start"]),
    ((Load(), failed(1, "unusable"), "adopt"), "cold", ["start"]),
    ((Load(), "stop", UP), "cold", ["start", "kill"]),
    ((Load(), UP, "stop", Load(), "due", Evict(reason="ordered")), "cold", ["start", "serve"]),
    (
        (Load(), UP, Evict(reason="idle"), Retired(loader=1), "wanted", "wanted"),
        "cold",
        ["start", "serve", "retire", "missed"],
    ),
]


@pytest.mark.parametrize(("events", "phase", "kinds"), CASES)
def test_each_event_in_each_phase(events: tuple[Event, ...], phase: str, kinds: list[Effect] | None) -> None:
    life, effects = play(*events)
    assert life.phase == phase
    if kinds is not None:
        assert effects == kinds


def test_restart_delays_grow_until_restarts_stop() -> None:
    life, now, delays = play(Load(), UP)[0], 0.0, []
    for _ in range(CRASHES_BEFORE_GIVING_UP):
        life, effects = step(life, Exited(loader=life.loader, cause="signal 9"), now)
        if "wake" not in effects:
            break
        delays.append(life.not_before_s - now)
        assert step(life, "due", life.not_before_s - 0.01)[0] == life or delays[-1] == 0.0, "not before its time"
        now = life.not_before_s
        life, _ = step(life, "due", now)
        life, _ = step(life, Started(attempt=life.attempt, version="v1"), now)
    assert delays == [0.0, 0.5, 1.5, 3.5]
    assert effects[-1] == "gave_up"
    assert (life.phase, life.restarts) == ("failed", 5)
    assert "5 times in 120 s (signal 9)" in life.reason


def test_old_crashes_and_those_of_another_version_do_not_count() -> None:
    life = play(Load(), UP, Exited(loader=1, cause="x"), "due", Started(attempt=2, version="v1"))[0]
    assert len(life.crashes) == 1
    assert len(step(life, Exited(loader=2, cause="x"), 1000.0)[0].crashes) == 1
    other = play(Load(), UP, Exited(loader=1, cause="x"), "due", Started(attempt=2, version="v2"))[0]
    assert other.crashes == ()


def test_a_load_that_does_not_fit_is_not_retried_at_once() -> None:
    life, _ = play(QUIET, failed(1, "no_room"), now_s=5.0)
    assert (life.state, life.not_before_s) == ("cold", 5.0 + AGAIN_S)


def test_a_closed_model_that_stays_in_use_is_reopened_for_a_while() -> None:
    life = play(Load(), UP)[0]
    close = Close(for_model="b", in_use=True, limit_s=10.0)
    life, effects = step(life, close, 0.0)
    assert (life.closed_for, effects) == ("b", ("toggled",))
    assert step(life, close, 10.0) == (life, ())
    life, effects = step(life, close, 10.5)
    assert (life.closed_for, life.open_until_s, effects) == ("", 20.5, ("toggled",))
    life = play(Load(), UP, close, Evict(reason="memory"), Retired(loader=1))[0]
    assert life.closed_for == "", "an evicted model may be loaded again"


# ---- any history ----

SIGNALS = st.sampled_from(
    ["due", "wanted", "adopt", "claim", "reserve", "release", "leave_rotation", "withdraw", "stop"]
)
FAULTS = st.sampled_from(["no_room", "died", "unusable", "cancelled"])
VERSIONS, NUMBERS = st.sampled_from(["v1", "v2"]), st.integers(0, 6)
EVENTS = st.one_of(
    SIGNALS,
    st.builds(Load, retries=st.booleans()),
    st.builds(Started, attempt=NUMBERS, version=VERSIONS),
    st.builds(StartFailed, attempt=NUMBERS, fault=FAULTS, reason=st.just("why")),
    st.builds(Exited, loader=NUMBERS, cause=st.just("x")),
    st.builds(Evict, reason=st.sampled_from(["ordered", "memory", "pressure"])),
    st.builds(Idle, idle_s=st.floats(0, 20), keep_alive_s=st.sampled_from([-1.0, 0.0, 10.0])),
    st.builds(Retired, loader=NUMBERS),
    st.builds(Planned, standby_bytes=st.integers(0, 9)),
    st.builds(Flipped, version=VERSIONS),
    st.builds(Close, for_model=st.sampled_from(["", "b"]), in_use=st.booleans(), limit_s=st.just(5.0)),
)
HISTORIES = st.lists(st.tuples(EVENTS, st.floats(0, 3)), max_size=60)


def test_events_of_every_kind_are_tried() -> None:
    """Including kinds that are added later."""
    named = {name for name in vars(lifecycle) if name in str(lifecycle.Event)}
    assert {"Load", "Started", "StartFailed", "Exited", "Evict", "Idle", "Retired", "Planned", "Flipped"} <= named


@given(HISTORIES)
def test_any_list_of_events_keeps_one_loader_and_does_each_thing_once(history: list[tuple[Event, float]]) -> None:
    """Including foreign, late and duplicate events."""
    life, now, done, wakes = Life(), 0.0, Counter[tuple[Effect, int]](), set[float]()
    for event, later_s in history:
        now += later_s
        before, (life, effects) = life, step(life, event, now)
        done.update((effect, _number(effect, before, event, life)) for effect in effects)
        wakes |= {life.not_before_s} if "wake" in effects else set()
        loaders = [number for number in (life.loader, life.attempt) if number]
        assert len(loaders) <= (2 if life.claim == "swap" else 1), "one loader, or one being started, outside a swap"
        assert not (life.attempt and life.attempt in life.abandoned)
        assert (life.phase == "ready") <= bool(life.loader)
        assert (life.claim == "load") == (bool(life.attempt) and life.claim != "swap")
        assert (life.claim == "evict") == bool(life.leaving)
        assert life.in_rotation or life.claim == "swap"
        if not life.stopped and life.phase == "backing_off":
            assert life.not_before_s in wakes, "a wake-up is due"
    assert not [one for one, times in done.items() if one[1] and times > 1]
    assert not {number for effect, number in done if effect == "serve"} & {n for e, n in done if e == "kill"}


def _number(effect: Effect, before: Life, event: Event, after: Life) -> int:
    """The loader that an effect is about; 0 where it is about none."""
    killed = event.attempt if isinstance(event, Started) else 0
    return {"start": after.attempt, "serve": after.loader, "kill": killed, "retire": after.leaving}.get(
        effect, before.loader if effect == "crashed" else 0
    )


@given(HISTORIES)
def test_every_state_settles(history: list[tuple[Event, float]]) -> None:
    """Once outcomes arrive and no new event is fed, no operation remains in progress."""
    life, now = Life(), 0.0
    for event, later_s in history:
        now += later_s
        life, _ = step(life, event, now)
    for _ in range(60):
        answer: Event | None = _answer(life)
        if answer is None:
            break
        now = max(now, life.not_before_s)
        life, _ = step(life, answer, now)
    assert (life.claim, life.attempt, life.leaving, life.abandoned) == ("", 0, 0, frozenset())
    assert life.phase in ("cold", "ready", "failed")
    assert life.phase != "ready" or life.loader


def _answer(life: Life) -> Event | None:
    """The next event in a world where everything works."""
    if life.attempt:
        return Started(attempt=life.attempt, version="v1")
    if life.abandoned:
        return StartFailed(attempt=min(life.abandoned), fault="cancelled", reason="")
    if life.leaving:
        return Retired(loader=life.leaving)
    if life.claim in ("swap", "reserved"):
        return "release"
    return "due" if life.phase == "backing_off" else None


# ---- a brute-force model: processes that run, as an observer counts them ----


@dataclass
class World:
    """Runs effects against simulated processes and remembers everything that happened, nothing else."""

    rng: random.Random
    life: Life = field(default_factory=Life)
    now_s: float = 0.0
    starting: set[int] = field(default_factory=set)
    running: dict[int, str] = field(default_factory=dict)
    draining: set[int] = field(default_factory=set)
    serving: int = 0
    wakes: list[float] = field(default_factory=list)
    crashes: list[float] = field(default_factory=list)
    exits: int = 0
    gave_up: bool = False

    def feed(self, event: Event) -> None:
        self.life, effects = step(self.life, event, self.now_s)
        for effect in effects:
            self._perform(effect, event, self.life)

    def _perform(self, effect: Effect, event: Event, life: Life) -> None:
        match effect:
            case "start":
                self.starting.add(life.attempt)
                self.gave_up = False
            case "serve":
                version = event.version if isinstance(event, Started | Flipped) else ""
                if self.serving and version != self.running.get(self.serving, version):
                    self.crashes.clear()
                if self.serving in self.running and self.serving != life.loader:
                    self.draining.add(self.serving)
                self.running[life.loader], self.serving = version, life.loader
            case "kill":
                assert isinstance(event, Started)
                self.running.pop(event.attempt)
            case "retire":
                self.draining.add(life.leaving)
                self.serving = 0
            case "wake":
                self.wakes.append(life.not_before_s)
            case "crashed":
                self.serving = 0
                self.exits += 1
            case "gave_up":
                self.gave_up = True
            case _:
                pass

    def anything(self) -> None:
        """One random event that the world or a caller could cause now."""
        self.now_s += self.rng.choice((0.0, 0.1, 1.0, 30.0))
        for at_s in [one for one in self.wakes if one <= self.now_s]:
            self.wakes.remove(at_s)
            self.feed("due")
        self.rng.choice((self._ask, self._ask, self._outcome, self._outcome, self._crash, self._drained, self._swap))()

    def _ask(self) -> None:
        self.feed(self.rng.choice((Load(), QUIET, Evict(reason="memory"), "wanted", Idle(idle_s=9, keep_alive_s=5))))

    def _outcome(self) -> None:
        if not self.starting:
            return
        attempt = self.rng.choice(sorted(self.starting))
        self.starting.discard(attempt)
        if self.rng.random() < 0.7:
            self.running[attempt] = "v1"
            self.feed(Started(attempt=attempt, version="v1"))
        else:
            fault: Fault = self.rng.choice(("no_room", "died", "unusable"))
            self.feed(StartFailed(attempt=attempt, fault=fault, reason="why"))

    def _crash(self) -> None:
        if self.serving:
            number = self.serving
            del self.running[number]
            self.feed(Exited(loader=number, cause="signal 9"))

    def _drained(self) -> None:
        for number in sorted(self.draining):
            self.draining.discard(number)
            self.running.pop(number, None)
            self.feed(Retired(loader=number))

    def _swap(self) -> None:
        if self.life.claim != "swap":
            self.feed("claim")
        elif self.rng.random() < 0.5:
            self.feed(Flipped(version=self.rng.choice(("v1", "v2"))))
        else:
            self.feed("release")


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_histories_agree_with_processes_that_are_counted(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        world = World(random.Random(seed))
        for _ in range(80):
            world.anything()
            life = world.life
            assert life.loader == world.serving, "the loader that serves is the one that runs"
            assert (life.loader in world.running) == bool(life.loader)
            assert life.restarts == world.exits
            assert world.starting == ({life.attempt} if life.attempt else set()) | life.abandoned
            alive = set(world.running) - world.draining
            assert alive == ({life.loader} if life.loader else set()), "no process is unaccounted for"
            assert (life.phase == "failed" and "restarts stopped" in life.reason) <= world.gave_up
