"""Which nodes a span has, and from when until when each of them counts."""

from datetime import date

import msgspec
import pytest

from aggregator.calendar import Span
from aggregator.config import AggregatorConfig, Node, check
from aggregator.fleet import Tenure, fleet
from aggregator.window import seconds
from shared import config
from tests.builders import DAY, MINUTE, T0, batch, window

HOUR = 60 * MINUTE
END = T0 + 24 * HOUR
SINCE, RETIRED = date(2026, 11, 20), date(2026, 11, 22)


def tenure(*minutes: int, node: Node | None = None, before: bool = False, now_ms: int = END) -> Tenure | None:
    made = [batch(minute=n, seq=n + 100) for n in (*((-60,) if before else ()), *minutes)]
    found = fleet(window(*made, span=DAY, nodes=["n1"]), [node] if node is not None else [], now_ms)
    return found[0] if found else None


def times(one: Tenure | None) -> tuple[int, int, int] | None:
    """Known since, owned since, until: in minutes of the day."""
    return one and tuple((t - T0) // MINUTE for t in (one.known_ms, one.owned_ms, one.until_ms))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("minutes", "node", "before", "expected"),
    [
        ((60,), None, False, (60, 60, 1440)),
        ((60,), None, True, (0, 0, 1440)),
        ((60,), Node(id="n1"), False, (60, 60, 1440)),
        ((60,), Node(id="n1", since=SINCE), False, (60, 0, 1440)),
        ((), Node(id="n1", since=SINCE), False, (1440, 0, 1440)),
        ((), Node(id="n1"), False, None),
        ((), Node(id="n1"), True, (0, 0, 1440)),
        ((), None, True, None),
        ((60,), Node(id="n1", since=RETIRED), False, (60, 1440, 1440)),
        ((), Node(id="n1", retired=date(2026, 11, 21)), True, None),
        ((60,), Node(id="n1", retired=date(2026, 11, 21)), True, (0, 0, 61)),
        ((60,), Node(id="n1", retired=RETIRED), True, (0, 0, 1440)),
    ],
)
def test_a_node_counts_from_its_first_report_or_its_purchase_until_it_is_retired(
    minutes: tuple[int, ...], node: Node | None, before: bool, expected: tuple[int, int, int] | None
) -> None:
    assert times(tenure(*minutes, node=node, before=before)) == expected


def test_silence_is_what_is_known_and_not_reported() -> None:
    one = tenure(60, 61, 600, node=Node(id="n1", since=SINCE), now_ms=T0 + 12 * HOUR)
    assert one is not None
    assert seconds(one.reported) == 180
    assert seconds(one.silent) == 11 * 3600 - 180
    assert seconds(one.unheard) == 12 * 3600 - 180
    assert not one.retired


def test_a_date_is_read_in_the_racks_zone_and_checked() -> None:
    text = 'rack = "r"\n[store]\nkind = "directory"\npath = "x"\n[[nodes]]\nid = "n1"\n'
    text += "since = 2026-11-20\nretired = {}\n"
    read = config.parse(text.format("2026-11-21"), AggregatorConfig, check, source="aggregator.toml")
    span = Span("d", T0 - 10 * HOUR, END, "Asia/Kolkata")
    (one,) = fleet(window(batch(minute=-400), span=span), read.nodes, END)
    assert one.until_ms == T0 - 5 * HOUR - 30 * MINUTE
    assert one.retired
    with pytest.raises(config.ConfigError, match=r"nodes\[0\]\.retired: 2026-11-20 is not after since"):
        config.parse(text.format("2026-11-20"), AggregatorConfig, check, source="aggregator.toml")
    with pytest.raises(config.ConfigError, match="retired"):
        config.parse(text.format('"soon"'), AggregatorConfig, check, source="aggregator.toml")


def test_a_batch_across_midnight_counts_once_and_its_time_in_both_days() -> None:
    across = msgspec.structs.replace(batch(minute=1439), t_start_ms=END - 20_000, t_end_ms=END + 40_000)
    today, tomorrow = DAY, Span("t", END, END + 24 * HOUR, "UTC")
    found = [window(across, span=span) for span in (today, tomorrow)]
    assert [one.batches for one in found] == [0, 1]
    assert [seconds(one.reported("n1")) for one in found] == [20, 40]
