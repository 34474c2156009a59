"""Windows, periods and prices: tables, and properties of the sliding window."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.limits.limit import Amounts, Limit, Name, cost, of_key, of_provider, parts, period
from agent.policy.limits.share import basis
from agent.policy.limits.use import SLOTS, WindowUse
from agent.policy.rates import Rate
from agent.policy.rules import KeyPolicy, Money, Provider

DAY_S = 86_400
events = st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50)), max_size=60)


@given(events, st.floats(1.0, 90.0))
def test_a_window_counts_at_least_what_its_length_holds_and_at_most_a_slot_more(
    found: list[tuple[float, int]], window_s: float
) -> None:
    use, now, log = WindowUse(window_s), 1000.0, []
    for pause_s, amount in found:
        now += pause_s
        use.add(amount, now)
        log.append((now, amount))
        exact = sum(n for at, n in log if at > now - window_s)
        more = sum(n for at, n in log if at > now - window_s * (1 + 2 / SLOTS))
        assert exact <= use.amount(now) <= more
    assert use.total == sum(n for _, n in log)


@given(events, st.floats(0.0, 50.0))
def test_what_is_saved_counts_as_long_after_a_restart(found: list[tuple[float, int]], away_s: float) -> None:
    use, now = WindowUse(60.0), 500.0
    for pause_s, amount in found:
        now += pause_s
        use.add(amount, now)
    again = WindowUse(60.0)
    again.put_back(((age + away_s, amount) for age, amount in use.ages(now)), 7.0)  # another monotonic clock
    for later_s in (0.0, 5.0, 30.0):
        assert again.amount(7.0 + later_s) >= use.amount(now + away_s + later_s)
    assert again.amount(7.0 + 61.0) == 0


def test_a_correction_within_the_window_frees_and_one_after_it_changes_nothing() -> None:
    use = WindowUse(60.0)
    slot = use.add(100, 10.0)
    use.adjust(slot, -60, 40.0)
    assert use.amount(40.0) == 40
    assert use.amount(80.0) == 0
    use.adjust(slot, -40, 80.0)
    assert use.amount(80.0) == 0
    use.adjust(slot, 5, 80.0)  # more than was reserved
    assert use.amount(80.0) == 5


def test_what_must_leave_before_there_is_room_says_when() -> None:
    use = WindowUse(60.0)
    use.add(3, 10.0)
    use.add(4, 20.0)
    assert use.free_in(1, 30.0) == pytest.approx(40.25, abs=0.3)
    assert use.free_in(4, 30.0) == pytest.approx(50.25, abs=0.3)
    assert use.free_in(8, 30.0) is None


@pytest.mark.parametrize(
    ("span", "wall_s", "start", "end"),
    [
        ("day", 0, 0, DAY_S),
        ("day", DAY_S - 1, 0, DAY_S),
        ("week", 0, -3 * DAY_S, 4 * DAY_S),  # 1970-01-01 was a Thursday
        ("week", 4 * DAY_S, 4 * DAY_S, 11 * DAY_S),
        ("week", 1_796_040_000, 1_795_996_800, 1_796_601_600),  # 2026-11-30, a Monday
        ("month", 1_796_040_000, 1_793_491_200, 1_796_083_200),
        ("month", 1_798_761_599, 1_796_083_200, 1_798_761_600),  # the last second of a year
        ("month", 1_709_164_800, 1_706_745_600, 1_709_251_200),  # 2024-02-29
    ],
)
def test_periods_are_calendar_periods_in_utc(span: str, wall_s: int, start: int, end: int) -> None:
    assert period(span, wall_s) == (start, end)  # type: ignore[arg-type]


@given(st.sampled_from(["day", "week", "month"]), st.integers(0, 4_000_000_000))
def test_every_moment_is_in_its_period_and_the_next_begins_where_it_ends(span: str, wall_s: int) -> None:
    found = period(span, wall_s)  # type: ignore[arg-type]
    assert found.start_s <= wall_s < found.end_s
    assert period(span, found.end_s).start_s == found.end_s  # type: ignore[arg-type]


@given(st.integers(0, 10**15), st.integers(1, 64))
def test_parts_sum_to_the_limit(most: int, nodes: int) -> None:
    found = list(parts(most, nodes))
    assert sum(found) == most
    assert max(found) - min(found) <= 1


@pytest.mark.parametrize(
    ("rate", "prompt", "completion", "nano"),
    [
        (None, 10**6, 10**6, 0),
        (Rate(usd_per_mtok_in=Decimal("0.05"), usd_per_mtok_out=Decimal("0.20")), 1, 0, 50),
        (Rate(usd_per_mtok_in=Decimal("0.05"), usd_per_mtok_out=Decimal("0.20")), 1000, 1000, 250_000),
        (Rate(usd_per_mtok_in=Decimal("0.0001"), usd_per_mtok_out=Decimal(0)), 1, 0, 1),  # rounded up
        (Rate(usd_per_mtok_in=Decimal(3), usd_per_mtok_out=Decimal(15)), 10**6, 10**6, 18 * 10**9),
    ],
)
def test_a_price_is_whole_billionths_rounded_up(rate: Rate | None, prompt: int, completion: int, nano: int) -> None:
    assert cost(rate, prompt, completion) == nano


def test_every_limit_of_the_policy_file_has_its_name() -> None:
    money = Money(requests=1, prompt_tok=2, completion_tok=3, usd="0.000001")
    key = KeyPolicy(id="*", requests_per_minute=9, tokens_per_minute=8, day=money, week=money, month=money)
    found = {limit.name.short: limit.most for limit in of_key(key, "alice")}
    assert found == {
        "requests_per_minute": 9,
        "tokens_per_minute": 8,
        **{
            f"{span}.{unit}": most
            for span in ("day", "week", "month")
            for unit, most in {"requests": 1, "prompt_tok": 2, "completion_tok": 3, "usd": 1000}.items()
        },
    }
    assert {limit.name.owner for limit in of_key(key, "alice")} == {"key:alice"}
    assert not of_key(KeyPolicy(id="*"), "alice")
    provider = Provider(name="o", kind="openai", usd_per_day="1.5", usd_per_month="20")
    assert [(one.name, one.most) for one in of_provider(provider)] == [
        (Name("provider:o", "day", "usd"), 1_500_000_000),
        (Name("provider:o", "month", "usd"), 20_000_000_000),
    ]


def test_a_basis_names_the_limit_and_its_nodes_in_any_order() -> None:
    assert basis(5, ["b", "a"]) == basis(5, ["a", "b"])
    assert len({basis(5, ["a", "b"]), basis(6, ["a", "b"]), basis(5, ["a"]), basis(5, ["ab"])}) == 4


def test_amounts_by_unit() -> None:
    found = Amounts(3, 4, 5)
    assert [found.of(unit) for unit in ("requests", "tokens", "prompt_tok", "completion_tok", "usd")] == [1, 7, 3, 4, 5]
    assert Limit(Name("key:a", "minute", "tokens"), 1).name.short == "tokens_per_minute"
