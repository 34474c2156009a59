"""Batches and segments round-trip, and nothing else is accepted."""

import tracemalloc

import msgpack
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from aggregator.window import facts_of
from shared.batch import MAX_SEGMENT_BYTES, Batch, decode, encode, seal, unseal
from shared.errors import Refused
from shared.records import RECORD_TYPES, PeerDown, prompt_bucket
from tests.builders import batch, engine, host, resident, served


def test_a_batch_round_trips() -> None:
    one = batch([served(), engine(), resident(), host(), PeerDown(t_ms=1, peer="n2", last_seen_ms=0)])
    assert one == decode(encode(one))
    assert [one, one] == unseal(seal([one, one]))


def test_equal_batches_give_equal_bytes() -> None:
    assert seal([batch([served()])]) == seal([batch([served()])])


def test_an_unknown_kind_of_record_is_counted_and_left_out() -> None:
    tree = msgspec.to_builtins(batch([served()]))
    tree["records"] = [*tree["records"], {"kind": "from_the_future", "x": 1}]
    read = decode(msgpack.packb(tree))
    assert (len(read.records), read.unknown_records) == (2, 1)


def test_known_records_keep_their_positions() -> None:
    tree = msgspec.to_builtins(batch([served()]))
    tree["records"] = [{"kind": "from_the_future"}, *tree["records"]]
    (fact,) = facts_of(decode(msgpack.packb(tree)))
    assert fact.ordinal == 1, "when the kind is known one day, nothing is counted twice"


@pytest.mark.parametrize("kind", [[1], {"a": 1}, None, 5])
def test_a_non_string_kind_is_rejected(kind: object) -> None:
    tree = {**msgspec.to_builtins(batch()), "records": [{"kind": kind}]}
    with pytest.raises(Refused):
        decode(msgpack.packb(tree))


def test_new_fields_of_a_newer_agent_are_ignored() -> None:
    tree = {**msgspec.to_builtins(batch()), "new_field": [1, 2]}
    assert batch() == decode(msgpack.packb(tree))


def test_a_batch_of_the_first_schema_still_decodes() -> None:
    """Written out by hand: batches of 0.1 agents must stay readable."""
    first_sketch = {"count": 1, "sum": 8, "min": 8, "max": 8, "idx": [95], "cnt": [1]}
    tree = {
        "v": 1,
        "rack": "r",
        "node": "n1",
        "incarnation": 1,
        "epoch": 2,
        "seq": 3,
        "t_start_ms": 1,
        "t_end_ms": 2,
        "records": [
            {"kind": "served", "model": "m", "requests": 1, "ttft_us": first_sketch},
            {"kind": "peer_up", "t_ms": 5, "peer": "n2", "down_us": 7},
        ],
    }
    read = decode(msgpack.packb(tree))
    assert read.id == ("n1", 1, 2, 3)
    assert len(read.records) == 2


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "0 batches"),
        (b"\xc1", "not MessagePack"),
        (msgpack.packb([1, 2]), "expected a map, found a list"),
        (msgpack.packb({"v": 99}), "schema version 99"),
        (msgpack.packb({"v": 1}), "missing required field"),
        (encode(batch([served()]))[:-3], "truncated|batches"),
        (msgpack.packb({**msgspec.to_builtins(batch()), "seq": "x"}), "Expected `int`"),
    ],
)
def test_invalid_batches_are_rejected(raw: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        decode(raw)


@pytest.mark.parametrize(
    "segment",
    [b"", b"hello", seal([batch()])[:-4], zstandard.compress(b""), zstandard.compress(b"\x00" * (65 << 20))],
    ids=["empty", "text", "truncated", "no batch", "bomb"],
)
def test_a_bad_segment_is_rejected(segment: bytes) -> None:
    with pytest.raises(Refused):
        unseal(segment)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt_tok": 2**63 + 5}, "prompt_tok: 9223372036854775813 is out of range"),
        ({"prompt_tok": -5}, "prompt_tok: -5 is out of range"),
        ({"model": "x" * 5_000}, "model: text of 5000 characters, the limit is 2000"),
        ({"ttft_us": {"count": 99, "min": 1, "max": 2, "idx": [3], "cnt": [1]}}, "counts do not add up"),
        ({"ttft_us": {"count": 1, "min": 1, "max": 2, "idx": [3, 4], "cnt": [1]}}, "counts do not add up"),
        ({"ttft_us": {"count": 1, "min": 1, "max": 2, "idx": [10**6], "cnt": [1]}}, "sketch: bucket out of range"),
        ({"ttft_us": {"count": 1, "idx": [3], "cnt": [1]}}, "minimum and maximum do not fit the count"),
        ({"ttft_us": {"count": 2, "min": 1, "max": 2, "idx": [3, 0], "cnt": [1, 1]}}, "buckets out of order"),
        ({"ttft_us": {"count": 1, "sum": -1, "min": 1, "max": 2, "idx": [3], "cnt": [1]}}, "count out of range"),
    ],
)
def test_impossible_numbers_are_rejected(change: dict[str, object], why: str) -> None:
    """They would pass type checks and fail every later run at a table that cannot hold them."""
    tree = msgspec.to_builtins(batch([served()]))
    tree["records"] = [{**tree["records"][0], **change}]
    with pytest.raises(Refused, match=why):
        decode(msgpack.packb(tree))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_rejected_cleanly(raw: bytes) -> None:
    for read in (decode, unseal):
        with pytest.raises(Refused):
            read(raw)


def test_every_record_fits_its_union() -> None:
    assert len(RECORD_TYPES) == 25
    for kind in RECORD_TYPES.values():
        assert kind.__struct_config__.frozen


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1_000), (1_000, 1_000), (1_001, 8_000), (10**9, 1_000_000)])
def test_prompt_buckets(tokens: int, bucket: int) -> None:
    assert bucket == prompt_bucket(tokens)


def test_duplicates_share_their_batch_id() -> None:
    assert batch(minute=3).id == batch([served()], minute=3).id
    assert isinstance(batch(), Batch)


def frame(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(raw)


BOMBS = {
    "nested arrays": lambda: frame(b"\x91" * 1_000_000 + b"\xc0"),
    "nested maps": lambda: frame(b"\x81\xa1a" * 500_000 + b"\xc0"),
    "an array of 4 billion": lambda: frame(b"\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": lambda: frame(b"\xdf\xff\xff\xff\xff"),
    "a text of 4 GB": lambda: frame(b"\xdb\xff\xff\xff\xff"),
    "bytes of 4 GB": lambda: frame(b"\xc6\xff\xff\xff\xff"),
    "an extension of 4 GB": lambda: frame(b"\xc9\xff\xff\xff\xff\x01"),
    "records of 4 billion": lambda: frame(b"\x81\xa7records\xdd\xff\xff\xff\xff"),
    "a field nested deeply": lambda: frame(b"\x82\xa1v\x01\xa7records" + b"\x91" * 1_000_000),
    "a gigabyte of zeros": lambda: frame(bytes(64 << 20)) * 16,
    "a window of 2 GB": lambda: (
        b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"  # magic, descriptor, window of 2^31, an empty last block
    ),
    "a frame that claims an exabyte": lambda: (
        b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00"
    ),
    "thousands of empty frames": lambda: frame(b"") * 5_000,
    "skippable frames": lambda: (b"\x50\x2a\x4d\x18\x00\x00\x00\x00") * 5_000,
    "many equal batches": lambda: seal([Batch(rack="r", node="n", epoch=1, seq=1, t_start_ms=0, t_end_ms=1)] * 60_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_and_stays_small(bomb: str) -> None:
    segment = BOMBS[bomb]()
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            unseal(segment)
        assert tracemalloc.get_traced_memory()[1] < 6 * MAX_SEGMENT_BYTES
    finally:
        tracemalloc.stop()
