"""Which prefixes each node holds, and the work of a loader."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.process.prefixes import (
    BLOCK_BYTES,
    BLOCK_TOK,
    LEAST_BLOCKS,
    MOST_BLOCKS,
    PrefixTable,
    matched,
    packed,
    prefix_key,
    text_of,
    unpacked,
)
from agent.process.workload import STALE_S, Throughput
from agent.wire.frames import Embed, Generate, Message, Working
from agent.wire.namespaces import OPEN, PROBES, Namespace, namespace_of

KEY = prefix_key("the rack secret")


def ask(*turns: str, **more: object) -> Generate:
    roles = ("system", "user", "assistant")
    messages = tuple(Message(role=roles[n % 3], content=text) for n, text in enumerate(turns))
    return Generate(id=1, model="m", messages=messages, max_tokens=9, **more)  # type: ignore[arg-type]


def chain(*turns: str, **more: object) -> tuple[int, ...]:
    return text_of(KEY, ask(*turns, **more)).chain


def test_a_continued_conversation_keeps_its_prefix_hashes() -> None:
    system, first, answer = "s" * 900, "u" * 700, "a" * 500
    short, long = chain(system, first), chain(system, first, answer, "and then? " * 50)
    assert len(short) == 6
    assert long[: len(short)] == short
    assert len(long) > len(short)


def test_the_chain_covers_the_whole_conversation() -> None:
    one, other = chain("s" * 2000, "x" * 600), chain("s" * 2000, "y" * 600)
    assert one[:7] == other[:7]
    assert matched(one, set(other)) == 7
    assert one[-1] != other[-1]


def test_template_text_is_part_of_the_chain() -> None:
    plain = chain("s" * 600)
    assert chain("s" * 600, tools=('{"name":"f"}',))[0] != plain[0]
    assert chain("s" * 600, reasoning_effort="high")[0] != plain[0]
    roles = Generate(id=1, model="m", messages=(Message(role="user", content="s" * 600),), max_tokens=9)
    assert text_of(KEY, roles).chain[0] != plain[0], "the same words by somebody else"


def test_hashes_depend_on_the_rack_secret() -> None:
    assert text_of(prefix_key("another"), ask("s" * 600)).chain != chain("s" * 600)
    assert text_of(b"", ask("s" * 600)).chain == ()


@given(
    st.lists(
        st.sampled_from([OPEN, PROBES, *map(namespace_of, "abc"), namespace_of("a", "b")]), min_size=2, unique=True
    )
)
def test_namespaces_have_no_hash_in_common(namespaces: list[Namespace]) -> None:
    chains = [set(chain("s" * 900, "u" * 700, cache=one)) for one in namespaces]
    assert sum(len(one) for one in chains) == len(set().union(*chains))
    table = PrefixTable()
    table.took(text_of(KEY, ask("s" * 900, cache=namespaces[0])), 0)
    assert [matched(chain("s" * 900, cache=one), table) for one in namespaces] == [3] + [0] * (len(namespaces) - 1)


def test_the_open_namespace_is_hashed_as_by_a_gateway_that_knows_of_none() -> None:
    """A peer of an older version sends none: its conversations keep their way."""
    state = hashlib.blake2b(key=KEY, digest_size=8)
    state.update(b"p" * BLOCK_BYTES)
    old = int.from_bytes(state.digest(), "little")
    assert text_of(KEY, Generate(id=1, model="m", prompt="p" * 300, max_tokens=1)).chain == (old,)


def test_long_prompts_are_bounded_and_short_ones_have_no_chain() -> None:
    huge = text_of(KEY, ask("x" * (MOST_BLOCKS + 50) * BLOCK_BYTES))
    assert len(huge.chain) == MOST_BLOCKS
    assert huge.prompt_tok > MOST_BLOCKS * BLOCK_TOK
    assert text_of(KEY, ask("short")).chain == ()
    assert text_of(KEY, Generate(id=1, model="m", prompt="p" * 512, max_tokens=1)).chain
    vectors = text_of(KEY, Embed(id=1, model="m", inputs=("x" * 40, (1, 2, 3))))
    assert (vectors.chain, vectors.prompt_tok) == ((), 14)


def test_a_private_request_is_routed_by_its_prefixes_and_adds_none() -> None:
    table, private = PrefixTable(), text_of(KEY, ask("s" * 900, private=True))
    table.took(private, 0)
    assert (private.chain, list(table), table.digest()) == (chain("s" * 900), [], b"")
    table.took(text_of(KEY, ask("s" * 900)), 0)
    assert matched(private.chain, table) == 3
    before = table.most
    table.took(private, 0)
    assert table.most == before, "nor does what it found there"
    assert text_of(KEY, Embed(id=1, model="m", inputs=("x",), private=True)).private


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_hashes_survive_encoding(hashes: list[int]) -> None:
    assert unpacked(packed(hashes)) == frozenset(hashes)
    assert unpacked(packed(hashes) + b"cut") == frozenset(hashes)


def test_a_table_keeps_the_latest_hashes_and_learns_its_size() -> None:
    table = PrefixTable()
    texts = [text_of(KEY, ask(f"{n} " * 40 * BLOCK_BYTES)) for n in range(30)]
    for text in texts:
        table.took(text, 0)
    assert texts[-1].chain[0] in table
    assert texts[0].chain[0] not in table
    assert len(list(table)) <= table.most == MOST_BLOCKS
    # an expected prefix is missing: the prompt cache is smaller than estimated
    for _ in range(20):
        table.took(texts[-1], 0)
    assert table.most == LEAST_BLOCKS
    for _ in range(50):
        table.took(texts[-1], texts[-1].prompt_tok)
    assert table.most == MOST_BLOCKS
    assert unpacked(table.digest()) == frozenset(table)
    table.clear()
    assert table.digest() == b""


def test_work_excludes_cached_tokens() -> None:
    meter = Throughput(rows=4)
    meter.begin(1, 100)
    meter.begin(2, 50)
    assert (meter.workload.requests, meter.workload.prefill_tok) == (2, 150)
    meter.accepted(1, 120, 80)
    assert meter.workload.prefill_tok == 90
    meter.token(1)
    assert meter.workload.prefill_tok == 50
    meter.end(2)
    meter.worked(1.0, Working(prefill_tok=40, prefill_us=80_000))
    meter.done(1.0, 1, 7)
    assert (meter.workload.requests, meter.workload.prefill_tok) == (0, 0)
    speed = meter.speed(1.0)
    assert speed.prefill_tps == pytest.approx(500.0)
    assert speed.answer_tok == 7


def test_speed_estimates_follow_measurements_and_expire() -> None:
    meter = Throughput(rows=4)
    for n in range(3):
        meter.worked(float(n), Working(decode_tok=80, decode_steps=80, decode_us=1_000_000))
    assert meter.speed(3.0).gap_us == pytest.approx(10_000, rel=0.01), "a row alone counts as less than a full batch"
    for n in range(9):
        meter.worked(3.0 + n, Working(decode_tok=20, decode_steps=5, decode_us=1_000_000))
    assert meter.speed(12.0).gap_us == pytest.approx(100_000, rel=0.1), "known within ten seconds"
    meter.worked(23.0, Working())
    assert meter.speed(23.0 + STALE_S + 1).gap_us is None, "a node that was slow is tried again"


class _Did(msgspec.Struct, frozen=True):
    what: str
    number: int
    amount: int


@given(
    st.lists(
        st.builds(
            _Did, st.sampled_from(("begin", "accepted", "token", "done", "end")), st.integers(0, 5), st.integers(0, 99)
        ),
        max_size=60,
    )
)
def test_work_accounting_balances_in_any_order(happened: list[_Did]) -> None:
    meter, open_ones = Throughput(rows=2), set()
    for n, did in enumerate(happened):
        if did.what == "begin" and did.number not in open_ones:
            meter.begin(did.number, did.amount)
            open_ones.add(did.number)
        elif did.what == "accepted":
            meter.accepted(did.number, did.amount, did.amount // 2)
        elif did.what == "token":
            meter.token(did.number)
        elif did.what == "done":
            meter.done(float(n), did.number, did.amount)
            open_ones.discard(did.number)
        elif did.what == "end":
            meter.end(did.number)
            open_ones.discard(did.number)
        assert meter.workload.requests == len(open_ones)
        assert meter.prefill_tok >= 0
    for number in open_ones:
        meter.end(number)
    assert (meter.workload.requests, meter.prefill_tok) == (0, 0)
