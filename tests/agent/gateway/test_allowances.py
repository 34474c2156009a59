"""Limits at one gateway: reservations, refusals, headers, what survives a restart or a broken disk."""

import asyncio
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.api.errors import status_of
from agent.gateway.allowances import NOTED, STATE, Allowances
from agent.gateway.noted_totals import ROWS, NotedTotals
from agent.gateway.outcomes import LIMITED, ended
from agent.policy.limits.share import Share, basis
from agent.policy.rates import Rate
from agent.policy.rules import KeyPolicy, Money, Provider, Rules
from shared.errors import Retryable

NOON_S = 1_796_040_000.0


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s

    def wall(self) -> float:
        return NOON_S + self.s


def allowances(folder: Path, *keys: KeyPolicy, clock: Clock | None = None, **more: Any) -> Allowances:
    rules, clock = Rules(keys=keys, providers=more.pop("providers", ())), clock or Clock()
    ids = [key.id for key in keys if key.id != "*"]
    nodes = more.pop("nodes", ["n1"])
    return Allowances(
        "n1", folder, nodes=nodes, rules=lambda: rules, key_ids=lambda: ids, clock=clock, wall=clock.wall, **more
    )


def refusal(held: Allowances, key: KeyPolicy, *amounts: Any, **more: Any) -> Retryable:
    with pytest.raises(Retryable) as caught:
        held.reserve(key, *(amounts or (10, 10, None)), **more)
    assert status_of(caught.value) == 429
    assert ended(caught.value) == LIMITED
    return caught.value


def test_a_limit_per_minute_slides(tmp_path: Path) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", requests_per_minute=3)
    held = allowances(tmp_path, key, clock=clock)
    for _ in range(3):
        held.reserve(key, 10, 10, None).settle(5, 5)
        clock.s += 10
    error = refusal(held, key)
    assert error.code == "rate_limited"
    assert error.retry_after_s == pytest.approx(30.25, abs=0.3)
    assert "alice" not in error.message
    clock.s += 30.3
    held.reserve(key, 10, 10, None).settle(5, 5)
    refusal(held, key)


def test_headers_are_those_of_openai(tmp_path: Path) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", requests_per_minute=60, tokens_per_minute=1000)
    held = allowances(tmp_path, key, KeyPolicy(id="bob"), clock=clock)
    held.reserve(key, 100, 50, None)
    assert held.headers("alice") == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "850",
        "x-ratelimit-reset-tokens": "1m1s",
    }
    assert held.headers("bob") == {}


def test_a_reservation_shrinks_to_what_is_counted_and_then_to_what_was_used(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", tokens_per_minute=1000, day=Money(completion_tok=500, usd="1"))
    held, rate = allowances(tmp_path, key), Rate(usd_per_mtok_in=Decimal(100), usd_per_mtok_out=Decimal(1000))

    def left() -> list[Any]:
        return [one["left"] for one in held.usage("alice")["limits"]]

    one = held.reserve(key, 600, 300, rate)
    assert left() == [100, 200, "0.64"]
    one.counted(150)
    assert left() == [550, 200, "0.685"]
    one.settle(150, 20)
    one.settle(150, 300)
    one.counted(999)
    one.release()
    assert left() == [830, 480, "0.965"]
    two = held.reserve(key, 600, 200, rate)
    two.release()
    assert left() == [830, 480, "0.965"]


def test_near_its_end_a_budget_admits_one_request_at_a_time(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", month=Money(completion_tok=100))
    held = allowances(tmp_path, key)
    one = held.reserve(key, 10, 4096, None)  # more than there is, but something is left
    refusal(held, key, 10, 4096, None)
    one.settle(5, 70)
    two = held.reserve(key, 10, 4096, None)
    two.settle(5, 90)  # overspent, by less than this one request
    error = refusal(held, key, 10, 1, None)
    assert error.code == "budget_exhausted"
    assert error.retry_after_s == pytest.approx(1_796_083_200 - NOON_S - 100)
    assert held.usage("alice")["limits"][0]["used"] == 160


def test_a_limit_of_tokens_smaller_than_any_answer_still_serves(tmp_path: Path) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", tokens_per_minute=1000)
    held, used = allowances(tmp_path, key, clock=clock), 0
    for _ in range(600):
        clock.s += 0.1
        try:
            held.reserve(key, 400, 4096, None).settle(60, 90)
        except Retryable:
            continue
        used += 150
    assert 900 <= used <= 1000


def test_all_limits_or_none_are_counted(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", requests_per_minute=10, day=Money(requests=1))
    held = allowances(tmp_path, key)
    held.reserve(key, 1, 1, None).settle(1, 1)
    assert refusal(held, key).code == "budget_exhausted"
    assert [one["used"] for one in held.usage("alice")["limits"]] == [1, 1]


def test_a_provider_s_cap_is_the_rack_s_and_not_a_key_s(tmp_path: Path) -> None:
    provider = Provider(name="o", kind="openai", secret="env:X", usd_per_day="1.00")
    alice, bob = KeyPolicy(id="alice"), KeyPolicy(id="bob")
    held = allowances(tmp_path, alice, bob, providers=(provider,))
    held.reserve(alice, 9, 9, None, provider=provider, most_usd=Decimal("0.80")).settle(9, 9, Decimal("0.75"))
    held.reserve(bob, 9, 9, None, provider=provider, most_usd=Decimal("0.30")).settle(9, 9, Decimal("0.30"))
    error = refusal(held, bob, 9, 9, None, provider=provider, most_usd=Decimal("0.01"))
    assert "the rack's o limit of 1 US dollars per day" in error.message
    held.reserve(bob, 9, 9, None)  # on the rack it costs nothing of that
    assert held.usage("bob")["limits"] == []
    assert held.view()["limits"][0]["used"] == "1.05"


def test_keys_without_an_entry_have_the_limits_of_the_default_each_for_itself(tmp_path: Path) -> None:
    every = KeyPolicy(id="*", requests_per_minute=1)
    held = allowances(tmp_path, every)
    for key_id in ("carol", "dave", ""):
        held.reserve(every, 1, 1, None, key_id=key_id)
        refusal(held, every, key_id=key_id)


def test_usage_says_whether_local_tokens_have_a_price(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", day=Money(usd="1", requests=5))
    held = allowances(tmp_path, key)
    assert held.usage("alice")["local_tokens_priced"]
    held.reserve(key, 10, 10, None).settle(5, 5)
    found = held.usage("alice")
    assert not found["local_tokens_priced"]
    assert found["limits"] == [
        {
            "name": "day.requests",
            "period": "day",
            "unit": "requests",
            "limit": 5,
            "used": 1,
            "left": 4,
            "starts_at": "2026-11-30T00:00:00Z",
            "resets_at": "2026-12-01T00:00:00Z",
        },
        {
            "name": "day.usd",
            "period": "day",
            "unit": "usd",
            "limit": "1",
            "used": "0",
            "left": "1",
            "starts_at": "2026-11-30T00:00:00Z",
            "resets_at": "2026-12-01T00:00:00Z",
        },
    ]


def test_a_clean_stop_a_new_start_and_a_new_policy_refill_nothing(tmp_path: Path) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", requests_per_minute=3, day=Money(requests=5))
    held = allowances(tmp_path, key, clock=clock)
    for _ in range(3):
        held.reserve(key, 1, 1, None).settle(1, 1)
    asyncio.run(held.save())
    again = allowances(tmp_path, key, clock=clock)
    assert refusal(again, key).code == "rate_limited"
    clock.s += 61
    later = allowances(tmp_path, KeyPolicy(id="alice", day=Money(requests=4)), clock=clock)
    more = KeyPolicy(id="alice", day=Money(requests=4))
    later.reserve(more, 1, 1, None)
    assert refusal(later, more).code == "budget_exhausted"


def test_a_new_policy_in_force_counts_what_was_used_under_the_old_one(tmp_path: Path) -> None:
    rules = [Rules(keys=(KeyPolicy(id="alice", day=Money(requests=2)),))]
    held = Allowances("n1", tmp_path, nodes=["n1"], rules=lambda: rules[0], key_ids=lambda: ["alice"])
    key = rules[0].keys[0]
    held.reserve(key, 1, 1, None)
    held.reserve(key, 1, 1, None)
    refusal(held, key)
    rules[0] = Rules(keys=(KeyPolicy(id="alice", day=Money(requests=3)),))
    key = rules[0].keys[0]
    asyncio.run(held.save())
    held.reserve(key, 1, 1, None)
    refusal(held, key)


KILLED = """
import sys, time
from pathlib import Path
from agent.gateway.allowances import Allowances
from agent.policy.rules import KeyPolicy, Money, Rules
key = KeyPolicy(id="alice", requests_per_minute=9, day=Money(requests=9))
rules = Rules(keys=(key,))
held = Allowances("n1", Path(sys.argv[1]), nodes=["n1"], rules=lambda: rules, key_ids=lambda: ["alice"])
for _ in range(7):
    held.reserve(key, 1, 1, None)
print("used", flush=True)
time.sleep(600)
"""


def test_sigkill_right_after_requests_refills_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "used\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not (tmp_path / STATE).exists(), "nothing was saved in time"
    key = KeyPolicy(id="alice", requests_per_minute=9, day=Money(requests=9))
    rules = Rules(keys=(key,))
    held = Allowances("n1", tmp_path, nodes=["n1"], rules=lambda: rules, key_ids=lambda: ["alice"])
    held.reserve(key, 1, 1, None)
    held.reserve(key, 1, 1, None)
    refusal(held, key)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa6wall_s\xa1x", os.urandom(200)])
def test_a_state_that_cannot_be_read_refills_nothing_until_the_period_ends(tmp_path: Path, body: bytes) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", day=Money(requests=5))
    held = allowances(tmp_path, key, clock=clock)
    held.reserve(key, 1, 1, None)
    asyncio.run(held.save())
    (tmp_path / STATE).write_bytes(body)
    (tmp_path / NOTED).write_bytes(body)
    again = allowances(tmp_path, key, clock=clock)
    refusal(again, key)
    asyncio.run(again.save())
    again = allowances(tmp_path, key, clock=clock)
    refusal(again, key)
    clock.s += 86_400
    again.reserve(key, 1, 1, None)


def test_a_full_disk_keeps_loans_from_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeyPolicy(id="alice", day=Money(requests=80))
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
    one = allowances(tmp_path / "1", key, nodes=["n1", "n2"])
    rules, clock = Rules(keys=(key,)), Clock()
    two = Allowances(
        "n2",
        tmp_path / "2",
        nodes=["n1", "n2"],
        rules=lambda: rules,
        key_ids=lambda: ["alice"],
        clock=clock,
        wall=clock.wall,
    )
    one.heard("n2", ())
    two.heard("n1", ())
    for _ in range(40):
        one.reserve(key, 1, 1, None)
    refusal(one, key)
    asyncio.run(one.save())
    two.heard("n1", one.beat())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("agent.gateway.allowances.write_whole", full)
        asyncio.run(two.save())
    assert "No space left" in two.problem
    assert not any(share.given for share in two.beat())
    clock.s += 1
    asyncio.run(two.save())
    assert two.problem == ""
    assert two.beat()[0].given["n1"] > 0
    one.heard("n2", two.beat())
    one.reserve(key, 1, 1, None)


def test_a_start_that_knows_its_peers_only_later_has_forgotten_no_loan(tmp_path: Path) -> None:
    clock, key = Clock(), KeyPolicy(id="alice", day=Money(requests=80))
    held = allowances(tmp_path, key, clock=clock, nodes=["n1", "n2"])
    wants = Share(owner="key:alice", span="day", unit="requests", period=1_795_996_800, want=40)
    held.heard("n2", [msgspec.structs.replace(wants, basis=basis(80, ["n1", "n2"]))])
    asyncio.run(held.save())
    assert held.beat()[0].given == {"n2": 40}
    again = allowances(tmp_path, key, clock=clock)
    asyncio.run(again.save())
    clock.s += 30
    again.members(["n1", "n2"])
    refusal(again, key)
    asyncio.run(again.save())
    assert again.beat()[0].given == {"n2": 40}


def test_what_moves_here_is_worth_a_retry_in_seconds(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", month=Money(requests=80))
    held = allowances(tmp_path, key, nodes=["n1", "n2"])
    error = refusal(held, key)  # nothing was heard of n2 yet
    assert (error.code, error.retry_after_s) == ("rate_limited", 2.0)
    held.heard("n2", ())
    for _ in range(40):
        held.reserve(key, 1, 1, None)
    error = refusal(held, key)
    assert (error.code, error.retry_after_s) == ("rate_limited", 2.0)
    assert "moves here within seconds" in error.message


async def test_saving_on_an_idle_rack_writes_nothing(tmp_path: Path) -> None:
    key = KeyPolicy(id="alice", day=Money(requests=5), requests_per_minute=5)
    clock = Clock()
    held = await asyncio.to_thread(allowances, tmp_path, key, clock=clock)
    held.reserve(key, 1, 1, None)
    await held.save()
    before = await asyncio.to_thread((tmp_path / STATE).stat)
    for _ in range(3):
        clock.s += 1
        await asyncio.sleep(0.01)
        await held.save()
    assert (await asyncio.to_thread((tmp_path / STATE).stat)).st_mtime_ns == before.st_mtime_ns


def test_rows_of_what_is_gone_make_room(tmp_path: Path) -> None:
    rows = NotedTotals(tmp_path / "rows")
    for number in range(ROWS):
        rows.row(f"old {number}")(number + 1)
    again = NotedTotals(tmp_path / "rows")
    assert again.noted("old 7") == 8
    again.row("old 7")
    again.row("new")(5)
    assert (again.noted("old 7"), again.noted("old 8")) == (8, 0)
    last = NotedTotals(tmp_path / "rows")
    assert (last.noted("new"), last.noted("old 7"), last.noted("old 8")) == (5, 8, 0)


def test_more_limits_than_rows_go_on_without(tmp_path: Path) -> None:
    rows = NotedTotals(tmp_path / "rows")
    for number in range(ROWS + 3):
        rows.row(f"label {number}")(1)
    assert NotedTotals(tmp_path / "rows").noted(f"label {ROWS + 1}") == 0
