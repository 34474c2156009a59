"""Alerts: once per state change, whatever is read twice, late or never."""

import http.server
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import alerts
from aggregator.alerts import RULES, AlertState, Firing, Notice, evaluate, observe
from aggregator.calendar import DAY_MS
from aggregator.commands import alert
from aggregator.config import AggregatorConfig, Alerts, check
from aggregator.config import Discord as DiscordConfig
from aggregator.notify import Discord, payload
from aggregator.window import Fact, facts_of, shifted, straightened
from shared import keys
from shared.batch import Batch, seal
from shared.bucket import Store
from shared.errors import Halt, Retryable
from shared.ids import NodeId
from shared.manual.topics import topics
from shared.records import (
    AgentStarted,
    AuditFailing,
    AuditRecovered,
    CertificateExpires,
    Event,
    HostSample,
    ModelEvicted,
    NodeIdClash,
    PeerDown,
    PeerUp,
    SwapFinished,
)
from shared.resources import pages
from shared.store_dir import DirectoryStore
from tests.builders import MINUTE, T0, batch, host

CONFIG = Alerts()


def facts(*batches: Batch) -> list[Fact]:
    return [f for b in batches for f in facts_of(straightened(b))]


def look(state: AlertState, now_ms: int, *batches: Batch) -> tuple[AlertState, list[tuple[str, str, bool]]]:
    state, notices = evaluate(observe(state, facts(*batches), now_ms, CONFIG), now_ms, CONFIG)
    return state, [(n.firing.code, n.firing.subject, n.resolved) for n in notices]


def down(minute: int, peer: str = "n2") -> PeerDown:
    return PeerDown(t_ms=T0 + minute * MINUTE, peer=peer, last_seen_ms=T0 + minute * MINUTE - 4_000)


def test_node_down_is_alerted_once_and_resolved_once() -> None:
    first, second = batch([host()], node="n2"), batch([down(1)], node="n1")
    state, told = look(AlertState(), T0 + MINUTE, first, second)
    assert told == [("node_down", "n2", False)]
    state, told = look(state, T0 + MINUTE + 1, batch([down(1)], node="n3"), second)
    assert told == [], "a second witness and a second copy are no news"
    back = batch([PeerUp(t_ms=T0 + 2 * MINUTE, peer="n2", down_us=1)], node="n1", minute=1)
    state, told = look(state, T0 + 2 * MINUTE, back)
    assert told == [("node_down", "n2", True)]
    _, told = look(state, T0 + 2 * MINUTE + 1, second, back)
    assert told == [], "the ordered copy of the old event comes after the return"


def test_missing_telemetry_is_a_node_down_too() -> None:
    state, told = look(AlertState(), T0 + MINUTE, batch([host()]))
    assert told == []
    state, told = look(state, T0 + MINUTE + 151_000)
    assert told == [("node_down", "n1", False)]
    _, told = look(state, T0 + 5 * MINUTE, batch([host()], minute=4))
    assert told == [("node_down", "n1", True)]


def test_throttling_needs_over_five_percent_of_five_minutes() -> None:
    mild = [batch([host(throttled=0.04)], minute=n) for n in range(5)]
    state, told = look(AlertState(), T0 + 5 * MINUTE, *mild)
    assert told == []
    state, told = look(state, T0 + 6 * MINUTE, batch([host(throttled=0.5)], minute=5))
    assert told == [("throttling", "n1", False)]
    _, told = look(state, T0 + 12 * MINUTE, *(batch([host()], minute=n) for n in range(6, 12)))
    assert told == [("throttling", "n1", True)]


def heat(hot_s: float, known_s: float, minute: int = 0, ahead_ms: int = 0) -> Batch:
    """A minute of which ``known_s`` were known and ``hot_s`` throttled."""
    sample = HostSample(thermal_known_us=round(known_s * 1e6), throttled_us=round(hot_s * 1e6))
    made = batch([sample], minute=minute)
    return msgspec.structs.replace(made, t_start_ms=made.t_start_ms + ahead_ms, t_end_ms=made.t_end_ms + ahead_ms)


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([(4.0, 60.0)], None),  # after a restart: 1.3 % of five minutes
        ([(1.0, 3.0)], None),
        ([(3.0, 60.0)] * 5, None),  # 15.0 s of 300
        ([(3.02, 60.0)] * 5, "15.1 s, 5.03% of the last 300 s"),
        ([(30.0, 60.0)] * 3, None),  # all of it hot, and 120 s of 300 are not known
        ([(3.0, 60.0)] * 3 + [(4.0, 60.0)], "13.0 s, 5.4% of the 240 s that are known of the last 300 s"),
        ([(0.0, 0.0)] * 4 + [(16.0, 16.0)], None),
        ([(60.0, 60.0)], None),
        ([(60.0, 60.0)] * 4, "240.0 s, 100% of the 240 s that are known of the last 300 s"),
        ([(60.0, 60.0)] * 4 + [(0.0, 0.0)], "240.0 s, 100% of the 240 s that are known of the last 300 s"),
        ([(48.0, 48.0)] * 5, "240.0 s, 100% of the 240 s that are known of the last 300 s"),
        ([(47.9, 47.9)] * 5, None),
        ([(0.0, 0.0)] * 5, None),
    ],
)
def test_a_share_of_too_little_knowledge_is_no_alert(windows: list[tuple[float, float]], said: str | None) -> None:
    made = [heat(hot_s, known_s, minute) for minute, (hot_s, known_s) in enumerate(windows)]
    state, told = look(AlertState(), T0 + len(made) * MINUTE, *made)
    assert (("throttling", "n1", False) in told) == (said is not None)
    texts = [firing.text for firing in state.firing if firing.code == "throttling"]
    assert texts == [f"n1 was thermally throttled for {said}"] * (said is not None)


def test_what_fired_ends_by_what_is_known_and_not_by_silence() -> None:
    state, told = look(AlertState(), T0 + 5 * MINUTE, *(heat(30.0, 60.0, minute) for minute in range(5)))
    assert told == [("throttling", "n1", False)]
    for minute in range(5, 15):  # the sensor is gone: windows come, and nothing is known
        state, told = look(state, T0 + (minute + 1) * MINUTE, heat(0.0, 0.0, minute))
        assert told == []
    state, told = look(state, T0 + 40 * MINUTE)
    assert told == [("node_down", "n1", False)], "nothing comes at all"
    state, told = look(state, T0 + 43 * MINUTE, *(heat(0.0, 60.0, minute) for minute in range(40, 43)))
    assert told == [("node_down", "n1", True)], "three minutes are not enough"
    state, told = look(state, T0 + 44 * MINUTE, heat(0.0, 60.0, 43))
    assert told == [("throttling", "n1", True)]
    _, told = look(state, T0 + 44 * MINUTE, *(heat(30.0, 60.0, minute) for minute in range(5)))
    assert told == [], "the hot windows, read again"


def test_windows_in_which_a_clock_was_set_have_the_time_that_they_know() -> None:
    made = [heat(60.0 if minute < 5 else 0.0, 60.0, minute, 7_200_000) for minute in range(10)]
    state, told = look(
        AlertState(), T0 + 10 * MINUTE, *(msgspec.structs.replace(b, t_start_ms=b.t_end_ms) for b in made)
    )
    assert told == []
    assert len(state.nodes["n1"].warm) == 5


def test_a_throttling_alert_begins_with_its_first_hot_window() -> None:
    state, _ = look(
        AlertState(), T0 + 5 * MINUTE, heat(0.0, 60.0), *(heat(30.0, 60.0, minute) for minute in range(1, 5))
    )
    (firing,) = state.firing
    assert firing.since_ms == T0 + MINUTE


@pytest.mark.parametrize("ahead_ms", [0, 600_000, 86_400_000])
@pytest.mark.parametrize("hot_s", [1.6, 3.2])
def test_windows_of_a_clock_that_runs_ahead_are_told_apart(ahead_ms: int, hot_s: float) -> None:
    """Five windows, all with the end that their node's clock gives them; 8 s are 2.7 %, 16 s are 5.3 %."""
    made = [heat(hot_s, 60.0, minute, ahead_ms) for minute in range(5)]
    one_by_one, firing = AlertState(), set[str]()
    for minute, each in enumerate(made):
        one_by_one, _ = look(one_by_one, T0 + (minute + 1) * MINUTE, each)
    for state in (one_by_one, look(AlertState(), T0 + 5 * MINUTE, *made, *made)[0]):
        again, told = look(state, T0 + 5 * MINUTE, *made)
        assert (told, again) == ([], state), "what is read twice counts once"
        firing = {one.code for one in state.firing}
        assert ("throttling" in firing) == (hot_s > 3.0)


def test_a_backlog_of_a_clock_that_runs_ahead_is_judged_by_its_last_five_minutes() -> None:
    made = [heat(60.0 if minute < 55 else 0.0, 60.0, minute, 7_200_000) for minute in range(60)]
    state, _ = look(AlertState(), T0 + 60 * MINUTE, *made)
    assert not [one for one in state.firing if one.code == "throttling"]
    assert len(state.nodes["n1"].warm) == 5


minutes = st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60)), min_size=1, max_size=9)


@given(minutes, st.sampled_from((None, 0, 700, -90_000, 90_000, -600_000, 600_000)), st.randoms())
def test_a_throttling_alert_is_of_four_fifths_that_are_known(
    windows: list[tuple[float, float]], skew_ms: int | None, random: Random
) -> None:
    """Whatever its clock says, in whatever order and however often its windows are read."""
    made = [skewed(heat(min(pair), max(pair), minute), skew_ms) for minute, pair in enumerate(windows)]
    read = [*made, *made]
    random.shuffle(read)
    state, _ = look(AlertState(), T0 + len(made) * MINUTE, *read)
    hot_s, known_s = (sum(f(pair) for pair in windows[-5:]) for f in (min, max))
    firing = any(one.code == "throttling" for one in state.firing)
    if known_s < 239.99:
        assert not firing
    elif known_s > 240.01 and abs(hot_s - 0.05 * known_s) > 0.01:
        assert firing == (hot_s > 0.05 * known_s)


def skewed(made: Batch, skew_ms: int | None) -> Batch:
    """A batch as a node writes it whose clock is ahead by so much, and knows it."""
    return msgspec.structs.replace(wrong(made, -(skew_ms or 0)), clock_skew_ms=skew_ms)


def wrong(made: Batch, earlier_ms: int) -> Batch:
    return msgspec.structs.replace(
        made,
        t_start_ms=made.t_start_ms - earlier_ms,
        t_end_ms=made.t_end_ms - earlier_ms,
        records=tuple(shifted(record, earlier_ms) for record in made.records),
    )


def copies(event: Event, minute: int, skews: tuple[int | None, int | None], ahead_ms: int) -> tuple[Batch, Batch]:
    """The urgent copy of an event, and the window that has it, each with the skew that was known when it was made."""
    urgent = msgspec.structs.replace(batch([event]), t_start_ms=event.t_ms, t_end_ms=event.t_ms)
    both = (urgent, batch([host(), event], minute=minute))
    first, second = (
        msgspec.structs.replace(wrong(one, -ahead_ms), clock_skew_ms=skew_ms)
        for one, skew_ms in zip(both, skews, strict=True)
    )
    return first, second


CLOCKS = [
    ((None, None), 0),
    ((0, 0), 0),
    ((600_480, 600_013), 600_000),  # the store's clock has whole seconds
    ((599_600, 600_013), 600_000),
    ((-599_600, -600_400), -600_000),
    ((119_900, 120_300), 120_000),  # on both sides of the two minutes
    ((90_400, 89_700), 90_000),
    ((None, 600_013), 600_000),  # the store had not answered yet
]


@pytest.mark.parametrize(("skews", "ahead_ms"), CLOCKS)
def test_an_event_that_is_read_twice_is_one(skews: tuple[int | None, int | None], ahead_ms: int) -> None:
    evicted = [ModelEvicted(t_ms=T0 + n * 1000, model="m", version="v", reason="memory") for n in range(4)]
    events: list[Event] = [*evicted, swap(0, "failed"), down(1), expires(20)]
    pairs = [copies(one, 0, skews, ahead_ms) for one in events]
    state, told = look(AlertState(), T0 + MINUTE + 1000, batch([host()], node="n2"), *(urgent for urgent, _ in pairs))
    once = {("swap_failed", "n1/m", False), ("node_down", "n2", False), ("certificate_expires", "n1/listener", False)}
    assert set(told) == once
    for order in (pairs, pairs[::-1]):
        state, told = look(state, T0 + 2 * MINUTE, batch([host()], node="n1", minute=1), *(late for _, late in order))
        assert told == [], "four evictions are no storm of eight, and one failure is not two"
    back = PeerUp(t_ms=T0 + 2 * MINUTE - 1000, peer="n2", down_us=1)
    state, told = look(state, T0 + 2 * MINUTE, copies(back, 1, skews, ahead_ms)[0])
    assert told == [("node_down", "n2", True)]
    state, told = look(state, T0 + 2 * MINUTE, *(one for pair in pairs for one in pair))
    assert told == [], "the copies of what is over"


def test_both_copies_in_a_bucket_are_one_notice(tmp_path: Path) -> None:
    """As agents write them: the clock is ten minutes ahead, and each copy tells a skew of its own second."""
    store, config = DirectoryStore(tmp_path), AggregatorConfig(rack="r", store=Store(path="b"))
    began_ms = time.time_ns() // 1_000_000 - 2 * MINUTE
    failed = msgspec.structs.replace(swap(0, "failed"), t_ms=began_ms)
    evicted = [ModelEvicted(t_ms=began_ms + n, model="m", version="v", reason="memory") for n in range(4)]
    urgent, ordered = (
        msgspec.structs.replace(
            batch([host(), failed, *evicted]),
            t_start_ms=began_ms,
            t_end_ms=began_ms + MINUTE,
            clock_skew_ms=600_000 + told_ms,
        )
        for told_ms in (330, -480)
    )
    store.put(keys.batch_key(keys.RawKey(NodeId("n1"), 1, 1, 1, 1)), seal([batch([host()], seq=1)]))
    alert.run(config, store, Discord({}))
    raw = keys.RawKey(NodeId("n1"), 1, 1, 2, 2)
    for key, made in ((keys.urgent_key(raw, 1), urgent), (keys.batch_key(raw), ordered)):
        ahead = msgspec.structs.replace(wrong(made, -600_000), seq=2)
        store.put(key, seal([ahead]))
        sent = alert.run(config, store, Discord({}))
        told = [(one.firing.code, one.resolved) for one in sent if one.firing.code != "node_down"]
        assert told == ([("swap_failed", False)] if made is urgent else [])


@pytest.mark.parametrize(("skews", "ahead_ms"), CLOCKS[1:-1])
def test_five_evictions_are_a_storm_whatever_the_clock(skews: tuple[int | None, int | None], ahead_ms: int) -> None:
    evicted = [ModelEvicted(t_ms=T0 + n * 1000, model="m", version="v", reason="memory") for n in range(5)]
    for which in (0, 1):
        state, told = look(AlertState(), T0 + MINUTE, *(copies(one, 0, skews, ahead_ms)[which] for one in evicted))
        assert told == [("eviction_storm", "n1", False)]
        (storm,) = state.firing
        assert abs(storm.since_ms - T0) < 1_000


@pytest.mark.parametrize("skew_ms", [-119_000, -600_000, 119_000, 600_000])
def test_a_node_whose_clock_is_off_is_silent_when_it_is_silent(skew_ms: int) -> None:
    state, told = look(AlertState(), T0 + MINUTE + 140_000, skewed(batch([host()]), skew_ms))
    assert told == []
    _, told = look(state, T0 + MINUTE + 151_000)
    assert told == [("node_down", "n1", False)]


def test_an_eviction_storm_ends_by_the_nodes_own_reports() -> None:
    evicted = [ModelEvicted(t_ms=T0 + n * 1000, model="m", version="v", reason="memory") for n in range(5)]
    state, told = look(AlertState(), T0 + MINUTE, batch(evicted))
    assert told == [("eviction_storm", "n1", False)]
    state, told = look(state, T0 + 30 * MINUTE)
    assert told == [("node_down", "n1", False)]
    state, told = look(state, T0 + 31 * MINUTE, batch([host()], minute=30))
    assert sorted(told) == [("eviction_storm", "n1", True), ("node_down", "n1", True)]
    late = look(AlertState(), T0 + 30 * MINUTE, batch(evicted))[1]
    assert late == [("node_down", "n1", False)], "of half an hour ago"


@pytest.mark.parametrize(
    ("evictions", "text"), [(1, "1 eviction on n1 within 600 s"), (2, "2 evictions on n1 within 600 s")]
)
def test_one_eviction_is_no_plural(evictions: int, text: str) -> None:
    evicted = [ModelEvicted(t_ms=T0 + n, model="m", version="v", reason="memory") for n in range(evictions)]
    config = Alerts(storm_evictions=1)
    state = observe(AlertState(), facts(batch(evicted)), T0 + MINUTE, config)
    assert [one.text for one in evaluate(state, T0 + MINUTE, config)[0].firing] == [text]


@pytest.mark.parametrize(
    ("days", "end"),
    [(20, "expires in 20 days"), (1.5, "expires in 1 day"), (0.5, "expires within a day"), (-1, "has expired")],
)
def test_the_days_of_a_certificate_are_counted_in_words(days: float, end: str) -> None:
    state, _ = look(AlertState(), T0, batch([expires(days)]))
    assert {one.text for one in state.firing} == {f"the listener certificate of n1 {end}"}


def test_the_state_of_a_node_is_bounded() -> None:
    many = [down(0, peer=f"n{n}") for n in range(500)]
    assert len(look(AlertState(), T0 + MINUTE, batch(many))[0].nodes["n1"].told) == 64


def test_evictions_of_a_clock_that_runs_ahead_are_told_apart() -> None:
    ahead = [ModelEvicted(t_ms=T0 + 3_600_000 + n, model="m", version="v", reason="memory") for n in range(5)]
    made = batch(ahead)
    _, told = look(AlertState(), T0 + MINUTE, made, made)
    assert told == [("eviction_storm", "n1", False)]
    _, told = look(AlertState(), T0 + MINUTE, batch(ahead[:4]), batch(ahead[:4], seq=2))
    assert told == [], "the urgent copy and the ordered one are one eviction"


def swap(minute: int, outcome: str) -> SwapFinished:
    t_ms = T0 + minute * MINUTE
    return SwapFinished(
        t_ms=t_ms, swap_id="s", model="m", from_version="a", to_version="b", outcome=outcome, reason="why"
    )


def test_a_failed_swap_fires_until_one_succeeds_or_an_hour_passes() -> None:
    state, told = look(AlertState(), T0 + MINUTE, batch([swap(0, "failed")]))
    assert told == [("swap_failed", "n1/m", False)]
    _, told = look(state, T0 + 2 * MINUTE, batch([swap(1, "flipped")], minute=1))
    assert told == [("swap_failed", "n1/m", True)]
    keep_alive = [batch([host()], minute=n) for n in range(1, 61)]
    _, told = look(state, T0 + 61 * MINUTE, *keep_alive)
    assert told == [("swap_failed", "n1/m", True)]


def test_a_late_duplicate_of_an_old_failure_is_not_alerted() -> None:
    failed, flipped = batch([swap(0, "failed")]), batch([swap(1, "flipped")], minute=1)
    state, told = look(AlertState(), T0 + MINUTE, failed)
    assert told == [("swap_failed", "n1/m", False)]
    state, told = look(state, T0 + 2 * MINUTE, flipped)
    assert told == [("swap_failed", "n1/m", True)]
    for late in (failed, flipped):
        state, told = look(state, T0 + 2 * MINUTE, late)
        assert told == []
    _, told = look(state, T0 + 4 * MINUTE, batch([swap(3, "failed")], minute=3))
    assert told == [("swap_failed", "n1/m", False)], "but a new failure is"


def test_a_clock_running_ahead_hides_no_alert() -> None:
    ahead = [batch([host(throttled=1.0)], minute=5_000_000 + n) for n in range(5)]
    state, told = look(AlertState(), T0 + MINUTE, *ahead)
    assert told == [("throttling", "n1", False)]
    _, told = look(state, T0 + 20 * MINUTE)
    assert told == [("node_down", "n1", False)]


def test_an_eviction_storm_needs_several_in_a_short_time() -> None:
    def evicted(second: int, reason: str = "memory") -> ModelEvicted:
        return ModelEvicted(t_ms=T0 + second * 1000, model="m", version="v", reason=reason)

    _, told = look(AlertState(), T0 + MINUTE, batch([evicted(n, "ordered") for n in range(9)]))
    assert told == []
    state, told = look(AlertState(), T0 + MINUTE, batch([evicted(n) for n in range(5)]))
    assert told == [("eviction_storm", "n1", False)]
    _, told = look(state, T0 + 12 * MINUTE, *(batch([host()], minute=n) for n in range(1, 12)))
    assert told == [("eviction_storm", "n1", True)]


def notice(text: str = "n1 was seen", *, resolved: bool = False, code: str = "node_down") -> Notice:
    rule = next(r for r in RULES if r.code == code)
    firing = Firing(code=code, subject="mini_1 @everyone", since_ms=T0, text=text)
    return Notice(rule=rule, firing=firing, resolved=resolved)


def test_a_message_is_within_limits_and_mentions_nobody() -> None:
    body: Any = payload(notice("x*" * 9_000))
    (embed,) = body["embeds"]
    assert body["allowed_mentions"] == {"parse": []}
    assert len(embed["title"]) <= 256
    assert len(embed["description"]) <= 4096
    assert "\\_1 \\@everyone" in embed["title"]
    resolved: Any = payload(notice(resolved=True))
    assert resolved["embeds"][0]["title"].startswith("Resolved: Node down")


def description(one: Notice, rack_name: str = "office") -> tuple[str, str]:
    """Title and text without the escapes, which are for Discord."""
    body: Any = payload(one, rack_name)
    (embed,) = body["embeds"]
    return embed["title"].replace("\\", ""), embed["description"].replace("\\", "")


def test_a_notice_names_the_rack_and_says_since_when_and_how_long() -> None:
    gone = batch([PeerDown(t_ms=T0 + 2 * MINUTE, peer="mini-3", last_seen_ms=T0)], node="mini-2", minute=1)
    state = observe(AlertState(), facts(gone), T0 + 3 * MINUTE, CONFIG)
    state, (fired,) = evaluate(state, T0 + 3 * MINUTE, CONFIG)
    title, text = description(fired)
    assert title == "Node down: mini-3 (rack office)"
    assert text.split("\n")[:2] == [
        "mini-3 does not answer the heartbeats of mini-2.",
        "It began at 2026-11-21 00:00:00 UTC, 3.0 min ago.",
    ]
    up = batch([PeerUp(t_ms=T0 + 30 * MINUTE, peer="mini-3", down_us=0)], node="mini-2", minute=30)
    state = observe(state, facts(up), T0 + 31 * MINUTE, CONFIG)
    state, notices = evaluate(state, T0 + 31 * MINUTE, CONFIG)
    (over,) = [one for one in notices if one.resolved]
    title, text = description(over)
    assert title == "Resolved: Node down: mini-3 (rack office)"
    assert text.split("\n")[:2] == [
        "Over after 30.0 min: from 2026-11-21 00:00:00 to 2026-11-21 00:30:00 UTC.",
        "It was: mini-3 does not answer the heartbeats of mini-2.",
    ]


def test_every_kind_of_notice_is_sentences_with_a_begin_and_a_duration() -> None:
    for rule in RULES:
        for resolved in (False, True):
            firing = Firing(code=rule.code, subject="n1", since_ms=T0, text="n1 is what it is")
            one = Notice(rule=rule, firing=firing, resolved=resolved, at_ms=T0 + 45 * MINUTE)
            title, text = description(one)
            assert "(rack office)" in title
            assert "2026-11-21 00:00:00" in text
            assert "45.0 min" in text
            assert ("2026-11-21 00:45:00" in text) is resolved
            early = msgspec.structs.replace(one, at_ms=T0 - MINUTE)  # clocks that differ
            assert "-" not in description(early)[1].split("\n")[0].split(":")[0].replace("2026-11-21", "")


class _Webhook(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.got: list[tuple[str, dict[str, Any]]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, _Webhook)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.got.append((self.path, body))
        status, headers = server.answers.pop(0) if server.answers else (200, {})
        self.send_response(status)
        for name, value in {"Content-Length": "2", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webhook() -> Iterator[_Webhook]:
    server = _Webhook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def discord(server: _Webhook, slept: list[float] | None = None) -> Discord:
    url = f"http://127.0.0.1:{server.server_address[1]}/hook/SECRET"
    return Discord({"alerts": url}, sleep=(slept if slept is not None else []).append)


def test_a_notice_is_posted_and_confirmed(webhook: _Webhook) -> None:
    assert discord(webhook).post(notice())
    ((path, body),) = webhook.got
    assert path == "/hook/SECRET?wait=true"
    assert body["username"] == "mlxrack"


def test_discord_rate_limits_are_honoured(webhook: _Webhook) -> None:
    slept: list[float] = []
    webhook.answers = [(429, {"Retry-After": "1.5"}), (500, {})]
    assert discord(webhook, slept).post(notice(code="throttling"))
    assert slept == [1.5, 4.0]


@pytest.mark.parametrize(("status", "kind"), [(404, Halt), (401, Halt), (503, Retryable)])
def test_a_rejecting_webhook_is_an_error_without_its_url(webhook: _Webhook, status: int, kind: type[Exception]) -> None:
    webhook.answers = [(status, {})] * 3
    with pytest.raises(kind) as caught:
        discord(webhook).post(notice())
    assert "SECRET" not in str(caught.value)


def test_without_a_webhook_nothing_is_sent() -> None:
    assert not Discord({}).post(notice())


def expires(days: float, now_ms: int = T0, certificate: str = "listener") -> CertificateExpires:
    ends_ms = now_ms + int(days * DAY_MS)
    return CertificateExpires(t_ms=now_ms, certificate=certificate, not_after_ms=ends_ms)


def codes(state: AlertState, now_ms: int, *batches: Batch) -> tuple[AlertState, list[tuple[str, str, bool]]]:
    """Without those of a node that is silent, because days pass."""
    state, told = look(state, now_ms, *batches)
    return state, [one for one in told if one[0] != "node_down"]


def test_an_expiry_is_alerted_thirty_and_seven_days_before_and_resolved_by_another_certificate() -> None:
    first = batch([host(), expires(40)])
    state, told = codes(AlertState(), T0, first)
    assert told == []
    expected = {
        10: ("certificate_expires", "n1/listener", False),
        33: ("certificate_expires_soon", "n1/listener", False),
    }
    for day in range(1, 45):
        # nothing comes from the node meanwhile, or the same again
        state, told = codes(state, T0 + day * DAY_MS, *([first] if day % 2 else []))
        assert told == ([expected[day]] if day in expected else []), day
    (text,) = {f.text for f in state.firing if f.code == "certificate_expires_soon"}
    assert "expires in" in text
    now_ms = T0 + 45 * DAY_MS
    late = batch([host(), expires(100, now_ms)], minute=45 * 24 * 60)
    state, told = codes(state, now_ms + MINUTE, late)
    assert sorted(told) == [(code, "n1/listener", True) for code in ("certificate_expires", "certificate_expires_soon")]
    _, told = codes(state, now_ms + 2 * MINUTE, first)
    assert told == [], "the old certificate's record, read again"


def test_certificates_of_a_node_are_told_apart_and_unknown_ones_are_not_kept() -> None:
    made_up = [expires(1, certificate=f"x{n}") for n in range(50)]
    state, told = codes(AlertState(), T0, batch([host(), expires(5), expires(20, certificate="ca"), *made_up]))
    assert sorted(told) == [
        ("certificate_expires", "n1/ca", False),
        ("certificate_expires", "n1/listener", False),
        ("certificate_expires_soon", "n1/listener", False),
    ]
    assert set(state.nodes["n1"].certificates) == {"ca", "listener"}


def test_a_notice_names_the_command_that_shows_its_runbook_and_the_page_where_phones_find_it() -> None:
    for text in ("x", "x" * 9_000):
        said: Any = payload(notice(text))
        assert said["embeds"][0]["description"].endswith("\nrunbook: `mlxrack-agent help node-down`")
        linked: Any = payload(notice(text), docs_url="https://wiki.example/mlxrack/")
        lines = linked["embeds"][0]["description"].splitlines()
        assert lines[-1] == "https://wiki.example/mlxrack/runbooks.md#node-down"
        assert len(linked["embeds"][0]["description"]) <= 4096


@pytest.mark.parametrize(
    ("url", "fine"),
    [("", True), ("https://wiki.example/docs", True), ("http://10.0.0.1:8000/d/", True), ("wiki.example", False)]
    + [(f"https://wiki.example/{odd}", False) for odd in (" x", "<x>", "(x)", '"')]
    + [("file:///docs", False), ("javascript:alert(1)", False)],
)
def test_a_docs_url_is_one(url: str, fine: bool) -> None:
    made = AggregatorConfig(rack="r", store=Store(path="b"), discord=DiscordConfig(docs_url=url))
    assert bool(check(made)) != fine


def test_every_rule_has_a_runbook_entry() -> None:
    known = topics(pages())
    for rule in RULES:
        assert known[rule.runbook].page == "runbooks", rule.code
        assert known[rule.runbook].title.lower().startswith(rule.runbook.replace("-", " ")), rule.code
    expiry = {"certificate_expires", "certificate_expires_soon"}
    assert {"node_down", "throttling", "swap_failed", "eviction_storm", "node_id_clash", "audit_failing", *expiry} == {
        r.code for r in alerts.RULES
    }


# two agents under one id


def clashes(state: AlertState, now_ms: int) -> list[str]:
    after, _ = alerts.evaluate(state, now_ms, CONFIG)
    return [f.subject for f in after.firing if f.code == "node_id_clash"]


def test_two_agents_under_one_id_are_alerted_of_and_resolved() -> None:
    event = NodeIdClash(t_ms=T0 + MINUTE, peer="n1", one="aaaaaaaa", other="bbbbbbbb")
    told = batch([event], node="n2", minute=1)
    state = alerts.observe(AlertState(), [*facts_of(told), *facts_of(told)], T0 + 2 * MINUTE, CONFIG)
    assert clashes(state, T0 + 2 * MINUTE) == ["n1"]
    (firing,) = [f for f in alerts.evaluate(state, T0 + 2 * MINUTE, CONFIG)[0].firing if f.subject == "n1"]
    assert firing.text == "two agents report as n1 (aaaaaaaa and bbbbbbbb): each needs its own node.id"
    assert clashes(state, T0 + 32 * MINUTE) == []


@pytest.mark.parametrize(
    ("incarnations", "fires"),
    [
        ([1, 1, 1, 2, 2, 2], False),
        ([2, 2, 1, 1], False),
        ([1, 1, 2, 2, 1, 1], False),
        ([1, 2, 1, 2, 1, 2], True),
        ([0, 1, 0, 1, 0, 1], False),
    ],
)
def test_spools_of_one_node_that_take_turns_are_two_agents(incarnations: list[int], fires: bool) -> None:
    """Older agents claim nothing: each of two has a spool, and an incarnation."""
    made = [msgspec.structs.replace(batch([host()], minute=n), incarnation=one) for n, one in enumerate(incarnations)]
    now_ms = T0 + 6 * MINUTE
    state = alerts.observe(AlertState(), [f for one in made for f in facts_of(one)], now_ms, CONFIG)
    assert clashes(state, now_ms) == (["n1"] if fires else [])
    assert clashes(state, now_ms + 60 * MINUTE) == []
    again = alerts.observe(state, [f for one in made for f in facts_of(one)], now_ms, CONFIG)
    assert clashes(again, now_ms) == (["n1"] if fires else []), "facts arrive twice"


# the audit log of a node


FULL = "the audit log of n1 cannot be written: its disk is full"


def audits(events: Sequence[Event], now_ms: int) -> list[str]:
    facts = [fact for n, event in enumerate(events) for fact in facts_of(batch([event], minute=n))]
    state = alerts.observe(AlertState(), [*facts, *facts], now_ms, CONFIG)
    return [f.text for f in alerts.evaluate(state, now_ms, CONFIG)[0].firing if f.code == "audit_failing"]


def failing(minute: int, why: str = "full", lost: int = 0) -> AuditFailing:
    return AuditFailing(t_ms=T0 + minute * MINUTE, why=why, since_ms=T0, lost=lost)


@pytest.mark.parametrize(
    ("events", "minute", "text"),
    [
        ([failing(1)], 2, FULL),
        ([failing(1), failing(11, lost=7)], 35, f"{FULL}; 7 entries are missing"),
        ([failing(1, "of_tomorrow")], 2, "the audit log of n1 cannot be written: its disk fails"),
        ([failing(1)], 32, ""),
        ([failing(1), AuditRecovered(t_ms=T0 + 2 * MINUTE, why="full", since_ms=T0)], 3, ""),
        ([AuditRecovered(t_ms=T0 + 2 * MINUTE, why="full", since_ms=T0), failing(1)], 3, ""),
        ([failing(1), AgentStarted(t_ms=T0 + 2 * MINUTE, version="1", previous="unclean")], 3, ""),
        ([AgentStarted(t_ms=T0, version="1", previous="clean"), failing(1)], 2, FULL),
    ],
)
def test_an_audit_log_that_fails_is_alerted_of_until_it_is_written_again(
    events: list[Event], minute: int, text: str
) -> None:
    assert audits(events, T0 + minute * MINUTE) == ([text] if text else [])
