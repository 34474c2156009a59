"""Authentication between nodes of a rack."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mesh.signing import FRESH_S, OLDEST, PROTOCOL, Key, Nonces, NotAPeer, RackKeys, mismatch, parse

KEYS = RackKeys(["the rack secret"])
(KEY,) = KEYS
NOW = 1_700_000_000_000
ASKED = {"method": "POST", "path": "/peer/v1/link"}


def header(
    keys: RackKeys = KEYS, *, body: bytes = b"frame", t_ms: int = NOW, node: str = "n1", nonce: str = "ab"
) -> str:
    return keys.header(node=node, to="me", **ASKED, body=body, t_ms=t_ms, nonce=nonce)


def code_of(header: str, *, body: bytes = b"frame", path: str = ASKED["path"], now_ms: int = NOW) -> str:
    with pytest.raises(NotAPeer) as caught:
        KEYS.check(header, me="me", method="POST", path=path, body=body, now_ms=now_ms)
    assert "secret" not in header
    return caught.value.code


def test_a_signed_request_identifies_its_sender() -> None:
    signed, key = KEYS.check(header(), me="me", **ASKED, body=b"frame", now_ms=NOW)
    assert (signed.node, signed.nonce, signed.protocol) == ("n1", "ab", PROTOCOL)
    assert key is KEY


def test_any_modification_is_rejected() -> None:
    good = header()
    assert code_of(header(RackKeys(["another"]))) == "not_a_peer"
    assert code_of(good, body=b"other") == "not_a_peer"
    assert code_of(good, path="/peer/v1/beat") == "not_a_peer"
    assert code_of(good.replace("node=n1", "node=n2")) == "not_a_peer"
    assert code_of(good.replace("to=me", "to=you")) == "not_a_peer"
    assert code_of(good.replace(f"t={NOW}", f"t={NOW + 1}")) == "not_a_peer"
    assert code_of(good.replace("nonce=ab", "nonce=cd")) == "not_a_peer"


@given(st.text(max_size=200))
def test_foreign_headers_are_rejected_without_an_exception(text: str) -> None:
    with pytest.raises(NotAPeer):
        KEYS.check(text, me="me", **ASKED, body=b"", now_ms=NOW)
    with pytest.raises(NotAPeer):
        parse(f"Mlxrack {text}")


def test_clock_skew_is_reported() -> None:
    late = NOW + int(FRESH_S * 1000) + 1
    assert code_of(header(), now_ms=late) == "clock_skew"
    assert code_of(header(), now_ms=NOW - int(FRESH_S * 1000) - 1) == "clock_skew"
    with pytest.raises(NotAPeer, match="clock of n1 differs by -60 s"):
        KEYS.check(header(), me="me", **ASKED, body=b"frame", now_ms=late)


def test_a_request_for_another_node_is_rejected_naming_both() -> None:
    with pytest.raises(NotAPeer, match="n1 calls this node 'me', but its id is 'you'") as caught:
        KEYS.check(header(), me="you", **ASKED, body=b"frame", now_ms=NOW)
    assert caught.value.code == "wrong_node"


def test_a_proof_is_bound_to_one_nonce_and_one_node() -> None:
    proof = KEY.proof("12", "n1")
    assert KEY.is_proof(proof, "12", "n1")
    assert not KEY.is_proof(proof, "13", "n1")
    assert not KEY.is_proof(proof, "12", "n2")
    assert not KEY.is_proof(KEY.answer("12", "n1"), "12", "n1")
    assert not Key("another").is_proof(proof, "12", "n1")


def test_protocol_mismatch_is_reported_first() -> None:
    newer = header().replace(f"v={PROTOCOL},oldest={OLDEST}", f"v={PROTOCOL + 2},oldest={PROTOCOL + 1}")
    older = header().replace(f"v={PROTOCOL},oldest={OLDEST}", f"v={OLDEST - 1},oldest={OLDEST - 1}")
    assert code_of(newer) == code_of(older) == "protocol_mismatch"
    assert "newer" in mismatch(PROTOCOL + 2, PROTOCOL + 1)
    assert "older" in mismatch(OLDEST - 1, OLDEST - 1)
    assert mismatch(PROTOCOL + 1, PROTOCOL) == "", "a newer one that still speaks ours"


def test_a_signature_cannot_be_replayed() -> None:
    nonces = Nonces(most=3)
    assert nonces.take("a", NOW)
    assert not nonces.take("a", NOW + 1)
    assert nonces.take("a", NOW + int(2 * FRESH_S * 1000) + 2), "by then its time has passed anyway"
    for one in "bcdef":
        assert nonces.take(one, NOW + int(2 * FRESH_S * 1000) + 3)


def test_an_answer_is_signed_for_its_request() -> None:
    answer = KEY.answer("ab", "n2", b"body")
    assert KEY.is_answer(answer, "ab", "n2", b"body")
    assert not KEY.is_answer(answer, "cd", "n2", b"body")
    assert not KEY.is_answer(answer, "ab", "n3", b"body")
    assert not KEY.is_answer(answer, "ab", "n2", b"other")
    assert not KEY.is_answer("\u00e9", "ab", "n2", b"body")
    assert not Key("another").is_answer(answer, "ab", "n2", b"body")


# ---- two secrets at once ----

OLD, NEW = "the secret before", "the secret after"
STAGES = ([OLD], [NEW, OLD], [NEW])
"""What a node has before, during and after a rotation; all nodes reach the second before any reaches the third."""


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_no_order_of_rotation_splits_the_rack(first: list[int], second: list[int]) -> None:
    nodes = [RackKeys(STAGES[0]) for _ in range(4)]
    for order, stage in ((first, STAGES[1]), (second, STAGES[2])):
        for node in order:
            nodes[node].become(stage)
            for caller in nodes:
                for called in nodes:
                    _understood(caller, called)
    assert all(node.marks == RackKeys([NEW]).marks for node in nodes)


def _understood(caller: RackKeys, called: RackKeys) -> None:
    signed, key = called.check(header(caller), me="me", **ASKED, body=b"frame", now_ms=NOW)
    answered = caller.answered_with(key.answer(signed.nonce, "me", b"body"), signed.nonce, "me", b"body")
    assert answered is not None
    assert answered.mark == key.mark
    common = [mark for mark in called.marks if mark in caller.marks]
    assert key.mark == common[0], "the newest that both have"


def test_a_secret_that_was_forgotten_counts_no_more() -> None:
    keys = RackKeys([NEW, OLD])
    _, of_old = keys.check(header(RackKeys([OLD])), me="me", **ASKED, body=b"frame", now_ms=NOW)
    newest = keys.newest
    keys.become([NEW])
    assert keys.newest is newest, "a connection that has this key stays"
    assert newest in keys
    assert of_old not in keys
    with pytest.raises(NotAPeer, match=r"peers\.secret must be the same"):
        keys.check(header(RackKeys([OLD])), me="me", **ASKED, body=b"frame", now_ms=NOW)


def test_a_version_that_knows_one_secret_reads_the_oldest_signature() -> None:
    """It looks at ``mac`` alone, so that a rack of two versions holds together as long as the oldest is there."""
    parts = header(RackKeys([NEW, OLD]))
    only_first = parts[: parts.index(",mac2=")]
    assert RackKeys([OLD]).check(only_first, me="me", **ASKED, body=b"frame", now_ms=NOW)


@pytest.mark.parametrize(
    ("mine", "accepted", "needs"),
    [
        ([NEW, OLD], [OLD], True),
        ([NEW, OLD], [NEW, OLD], False),
        ([NEW, OLD], [NEW], False),
        ([NEW], [NEW, OLD], False),
        ([OLD], [NEW, OLD], False),
        ([NEW, OLD], [], None),
        ([NEW, OLD], None, None),
        ([], [OLD], None),
    ],
)
def test_who_needs_the_old_secret(mine: list[str], accepted: list[str] | None, needs: bool | None) -> None:
    marks = None if accepted is None else RackKeys(accepted).marks
    assert RackKeys(mine).needs_older(marks) is needs


def test_marks_and_headers_reveal_no_secret() -> None:
    keys = RackKeys([NEW, OLD])
    assert len(set(keys.marks)) == 2
    assert not any(secret in header(keys) + str(keys.marks) for secret in (NEW, OLD))


def test_prompts_are_hashed_alike_until_the_first_node_forgets_the_old_secret() -> None:
    assert RackKeys([NEW, OLD]).prefix_key == RackKeys([OLD]).prefix_key != RackKeys([NEW]).prefix_key
