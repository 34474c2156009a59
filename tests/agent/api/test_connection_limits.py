"""Who is admitted, who is closed for another, whose time is over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.connection_limits import (
    MOST_SPARE,
    UNREAD_STEP_BYTES,
    Caps,
    Connection,
    Phase,
    Table,
    caps_within,
    client_of,
    descriptors_for,
)

CAPS = Caps(total=4, per_address=3, spare=1)


def entered(table: Table, address: str, now_s: float, phase: Phase = "greeting", *, known: bool = False) -> Connection:
    connection, _ = table.enter(address, now_s)
    assert connection is not None
    table.move(connection, phase, now_s, known=known)
    return connection


@pytest.mark.parametrize(
    ("phases", "closed"),
    [
        ([("idle", True), ("idle", False), ("greeting", False), ("busy", False)], 1),
        ([("idle", True), ("busy", False), ("greeting", False), ("idle", False)], 2),
        ([("idle", True), ("idle", False), ("busy", False), ("busy", True)], 1),
        ([("idle", True), ("busy", False), ("busy", True), ("idle", True)], 0),
        ([("greeting", False), ("greeting", False), ("idle", False), ("idle", True)], 0),
        ([("idle", False), ("unread", False), ("busy", True), ("busy", True)], 0),
        ([("busy", False), ("busy", False), ("busy", True), ("busy", True)], None),
    ],
)
def test_who_is_closed_when_all_are_taken(phases: list[tuple[Phase, bool]], closed: int | None) -> None:
    table = Table(CAPS)
    there = [entered(table, f"a{n}", n, phase, known=known) for n, (phase, known) in enumerate(phases)]
    admitted, rival = table.enter("new", 9)
    assert rival is (None if closed is None else there[closed])
    assert (admitted is None) == (closed is None)
    assert len(table) == 4


def test_an_address_that_has_all_its_own_makes_room_for_itself_only() -> None:
    table = Table(CAPS)
    other = entered(table, "b", 0)
    mine = [entered(table, "a", 1 + n) for n in range(3)]
    admitted, rival = table.enter("a", 9)
    assert admitted is not None
    assert rival is mine[0]
    for one in [*mine[1:], admitted]:
        table.move(one, "busy", 10)
    assert table.enter("a", 11) == (None, None)
    assert table.counts.refused == 1
    table.leave(other)
    assert table.enter("b", 12)[0] is not None


def test_the_last_places_serve_peers_and_operators_alone() -> None:
    table = Table(CAPS)
    there = [entered(table, f"a{n}", n, "busy") for n in range(3)]
    entered(table, "a", 3)
    assert table.serves("/v1/models"), "connections without a request take no place"
    entered(table, "b", 4, "busy")
    assert not table.serves("/v1/models")
    assert all(table.serves(path) for path in ("/peer/v1/beat", "/admin/v1/status", "/health", "/metrics"))
    table.leave(there[0])
    assert table.serves("/v1/models"), "a place of clients is free again"


def test_time_is_over_for_late_headers_and_idle_connections_never_for_requests() -> None:
    table = Table(Caps(total=9, per_address=9, spare=0))
    late, soon = entered(table, "a", 0), entered(table, "a", 6)
    idle, known = entered(table, "a", 0, "idle"), entered(table, "a", 8, "idle", known=True)
    entered(table, "a", 0, "busy")
    assert table.overdue(9.9, header_s=10, idle_s=20) == []
    assert table.overdue(10, header_s=10, idle_s=20) == [late]
    assert table.overdue(20, header_s=10, idle_s=20) == [late, soon, idle]
    assert table.overdue(28, header_s=10, idle_s=20)[-1] is known


def test_a_client_that_reads_nothing_for_too_long_is_found_and_a_slow_one_is_not() -> None:
    table, unsent = Table(CAPS), 100 << 10
    connection = entered(table, "a", 0, "busy")
    connection.unsent = lambda: unsent
    table.stalled(connection, 0)
    assert connection.phase == "unread", "nobody knows it: it may be closed for another"
    unsent -= UNREAD_STEP_BYTES
    assert table.unread(5, 4) == []
    unsent -= UNREAD_STEP_BYTES - 1
    assert table.unread(8, 4) == []
    assert table.unread(9, 4) == [connection]
    table.reads(connection, 10)
    assert table.unread(99, 4) == []
    assert table.first_to_close(99) is None, "it is in a request again"


def test_a_known_client_that_reads_slowly_keeps_its_place() -> None:
    table = Table(CAPS)
    connection = entered(table, "a", 0, "busy", known=True)
    table.stalled(connection, 0)
    assert (connection.phase, table.first_to_close(99)) == ("busy", None)


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%en0", "fe80::/64%en0"),
        ("fe80::1:2:3%en0", "fe80::/64%en0"),
        ("::2", "::/64"),
        ("::1", ""),
        ("127.0.0.9", ""),
        ("::ffff:127.0.0.1", ""),
        ("10.9.0.7", ""),
        ("::ffff:10.9.0.7", ""),
        ("2001:db8:9::7", ""),
        ("/a/socket", "/a/socket"),
    ],
)
def test_what_counts_as_one_address(address: str, client: str) -> None:
    assert client_of(address, proxies=("10.9.0.0/24", "2001:db8:9::7")) == client


def test_a_proxy_s_clients_share_its_address_and_may_take_all_places() -> None:
    table = Table(CAPS)
    for n in range(4):
        entered(table, "", n, "busy", known=True)
    assert len(table) == CAPS.total > CAPS.per_address
    assert table.enter("", 5) == (None, None)


def test_link_local_addresses_are_of_their_interface() -> None:
    assert client_of("fe80::1", 4) == client_of("fe80::99:2", 4) != client_of("fe80::1", 5)
    assert client_of("2001:db8::1", 4) == client_of("2001:db8::2", 5)


@given(st.integers(16, 100_000), st.integers(16, 5000), st.integers(1, 5000), st.integers(0, 20), st.integers(0, 16))
def test_connections_leave_descriptors_for_the_node_itself(
    files: int, wanted: int, per_address: int, models: int, peers: int
) -> None:
    caps = caps_within(files, wanted, per_address, models=models, peers=peers)
    own = descriptors_for(0, models=models, peers=peers)
    assert 1 <= caps.total <= wanted
    assert 1 <= caps.per_address <= caps.total
    assert 0 <= caps.spare <= min(MOST_SPARE, caps.total // 4)
    assert caps.total + own <= files or caps.total <= files // 4


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "idle", "busy", "known", "leave", "stalled", "reads"]),
        st.integers(0, 9),
        st.sampled_from("abc"),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_whatever_happens_the_caps_hold_and_only_a_lesser_one_is_closed(operations: list[tuple[str, int, str]]) -> None:
    table, there = Table(CAPS), list[Connection]()
    for now_s, (what, at, address) in enumerate(operations):
        if what == "enter":
            before = list(there)
            connection, rival = table.enter(address, now_s)
            if rival is not None:
                there.remove(rival)
                assert rival.phase != "busy", "no request is cut"
                group = [one for one in before if one.address == address]
                is_group = len(group) >= CAPS.per_address
                rivals = [one for one in (group if is_group else before) if one.phase != "busy"]
                strangers = [one for one in rivals if not one.known]
                assert rival in rivals, "who has all its own makes room for itself only"
                if strangers and rival is not strangers[0]:
                    assert strangers[0].is_new(now_s), "the first stranger goes first"
                    assert rival.known or is_group
            if connection is not None:
                there.append(connection)
            else:
                of_address = [one for one in there if one.address == address]
                full = of_address if len(of_address) >= CAPS.per_address else there
                assert all(one.phase == "busy" for one in full)
        elif there:
            one = there[at % len(there)]
            if what == "leave":
                there.remove(one)
                table.leave(one)
                table.leave(one)
            elif what == "stalled":
                table.stalled(one, now_s)
            elif what == "reads":
                table.reads(one, now_s)
            else:
                table.move(one, "idle" if what == "idle" else "busy", now_s, known=what == "known")
        assert len(table) == len(there) <= CAPS.total
        assert all(sum(one.address == a for one in there) <= CAPS.per_address for a in "abc")
    for one in there:
        table.leave(one)
    assert (len(table), table.unread(1e9, 0)) == (0, [])


PEOPLE = st.lists(st.tuples(st.sampled_from(["greeting", "idle", "unread", "known", "busy"]), st.integers(0, 19)))
ARRIVALS = st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=40)


def there_before(table: Table, people: list[tuple[str, int]], most_busy: int, group: str = "") -> list[Connection]:
    """Strangers in any state, and clients with a key, who are in requests at ``most_busy`` places."""
    found = list[Connection]()
    for phase, address in people:
        connection, rival = table.enter(group or f"s{address}", -50)
        found = [one for one in found if one is not rival]
        if connection is None:
            continue
        found.append(connection)
        if phase == "known" or (phase == "busy" and sum(one.phase == "busy" for one in found) >= most_busy):
            table.move(connection, "idle", -40, known=True)
        elif phase == "busy":
            table.move(connection, "busy", -40, known=True)
        elif phase != "greeting":
            table.move(connection, phase, -40)  # type: ignore[arg-type]
    return found


def comes(table: Table, address: str, now_s: float, *, asks: bool) -> None:
    """A stranger, who at once asks what anybody may, or does not."""
    connection, _ = table.enter(address, now_s)
    if connection is not None and asks:
        table.move(connection, "busy", now_s)
        table.move(connection, "idle", now_s)


@given(PEOPLE, ARRIVALS)
def test_a_newcomer_s_request_of_the_first_second_is_served_whatever_others_hold(
    people: list[tuple[str, int]], arrivals: list[tuple[int, bool]]
) -> None:
    """As long as fewer come within that second than others can be closed."""
    table = Table(Caps(total=16, per_address=8, spare=2))
    there_before(table, people, most_busy=8)
    mine, _ = table.enter("mine", 0)
    assert mine is not None
    strangers = [one for one in table._queues["unknown"] if one.phase != "busy"]
    for n, (address, asks) in enumerate(arrivals[: max(3, len(strangers) - 1)]):
        comes(table, f"s{address}", n / 50, asks=asks)
    assert mine in table._queues["unknown"]
    table.move(mine, "busy", 1.0, known=True)
    for address, asks in arrivals:
        comes(table, f"s{address}", 1.5, asks=asks)
    assert mine in table._queues["busy"]


@given(PEOPLE, ARRIVALS)
def test_so_is_that_of_one_who_shares_its_address_with_them(
    people: list[tuple[str, int]], arrivals: list[tuple[int, bool]]
) -> None:
    table = Table(Caps(total=16, per_address=8, spare=2))
    there_before(table, people, most_busy=4, group="office")
    mine, _ = table.enter("office", 0)
    assert mine is not None
    for n, (_, asks) in enumerate(arrivals[:3]):
        comes(table, "office", n / 50, asks=asks)
    assert mine in table._queues["unknown"]


def test_who_has_asked_once_and_asks_again_is_closed_before_who_came_later() -> None:
    """Five addresses of a stranger hold the table of a keyed node, and renew what they hold."""
    table = Table(Caps(total=2048, per_address=512, spare=32))
    held = [entered(table, f"evil{n % 5}", n / 1000, "idle") for n in range(2048)]
    for n, one in enumerate(held):
        table.move(one, "busy", 3 + n / 1000)
        table.move(one, "idle", 3 + n / 1000)
    newcomers = [table.enter(f"office{n}", 10 + n / 100) for n in range(50)]
    assert [rival for _, rival in newcomers] == held[:50]
    assert [one for one, _ in newcomers if one is None] == []
