"""Object keys: round trip, uniqueness and write order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import keys
from shared.errors import Refused
from shared.ids import NodeId

numbers = st.integers(min_value=0, max_value=10**9)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(names, st.integers(0, 9999), st.integers(0, 10**8 - 1), numbers, numbers)
def test_a_key_round_trips(node: str, incarnation: int, epoch: int, first: int, more: int) -> None:
    raw = keys.RawKey(NodeId(node), incarnation, epoch, first, first + more)
    assert raw == keys.parse_batch_key(keys.batch_key(raw))


@given(
    st.tuples(st.integers(0, 9999), numbers.filter(lambda n: n < 10**8), numbers),
    st.tuples(st.integers(0, 9999), numbers.filter(lambda n: n < 10**8), numbers),
)
def test_keys_sort_in_write_order(a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    def key(t: tuple[int, int, int]) -> str:
        return keys.batch_key(keys.RawKey(NodeId("n"), t[0], t[1], t[2], t[2]))

    assert (a < b) == (key(a) < key(b))


@pytest.mark.parametrize(
    "key",
    [
        "raw/v1/node=n1/hello.txt",
        "raw/v1/node=n1/i1/e00000001/0000000001-0000000001.mpz",
        "raw/v1/node=n1/i0001/e00000001/0000000002-0000000001.mpz",
        "raw/v1/node=../i0001/e00000001/0000000001-0000000001.mpz",
        "raw/v1/node=n1/i00001/e00000001/0000000001-0000000001.mpz",
        "",
    ],
)
def test_a_foreign_key_is_rejected(key: str) -> None:
    with pytest.raises(Refused):
        keys.parse_batch_key(key)


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "ä", "x" * 64])
def test_a_name_invalid_in_a_key_is_rejected(name: str) -> None:
    with pytest.raises(Refused, match="use 1 to 63"):
        keys.check_name(name, "node id")


@given(names, st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.integers(1, 10**14), st.integers(0, 10**14))
def test_a_key_of_an_audit_log_round_trips(node: str, chain: str, first: int, more: int) -> None:
    key = keys.AuditKey(NodeId(node), chain, first, first + more)
    assert keys.parse_audit_key(keys.audit_key(key)) == key
    assert keys.audit_key(key).startswith(keys.audit_node_prefix(node))


@pytest.mark.parametrize(
    "key",
    [
        "audit/v1/node=n1/c0123456789abcdef/000000000002-000000000001.jsonl.zst",
        "audit/v1/node=../c0123456789abcdef/000000000001-000000000002.jsonl.zst",
        "audit/v1/node=n1/c0123456789ABCDEF/000000000001-000000000002.jsonl.zst",
        "audit/v1/node=n1/c0123456789abcdef/0000000000001-000000000002.jsonl.zst",
        "audit/v1/node=n1/000000000001-000000000002.jsonl.zst",
        "audit/v1/node=n1/c0123456789abcdef/000000000001-000000000002.jsonl",
    ],
)
def test_a_foreign_key_of_an_audit_log_is_rejected(key: str) -> None:
    with pytest.raises(Refused):
        keys.parse_audit_key(key)
