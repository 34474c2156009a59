"""Answers are restored exactly, however the stream is cut."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.outgoing import Called, Piece
from agent.policy.redaction import Redacted
from agent.policy.redaction.restoring import Restorer
from tests.agent.policy.redaction.test_replacing import CARD, MAIL, chat, sent


def placeholders(redacted: Redacted) -> list[str]:
    return list(redacted.originals)


def restored(redacted: Redacted, chunks: list[str]) -> str:
    restorer = Restorer(redacted)
    return "".join(restorer.piece(Piece(text=one)).text for one in chunks) + restorer.end().text


def test_a_placeholder_is_restored_at_every_split_of_the_stream() -> None:
    redacted = sent(chat(f"{CARD} {MAIL}"))
    card, mail = placeholders(redacted)
    answer = f"C CARD {card[:-1]} {card}, {mail}{card} E."
    wanted = f"C CARD {card[:-1]} {CARD}, {MAIL}{CARD} E."
    for first in range(len(answer) + 1):
        for second in range(first, len(answer) + 1):
            assert restored(redacted, [answer[:first], answer[first:second], answer[second:]]) == wanted


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_any_split_gives_the_same_text(sizes: list[int], seed: int) -> None:
    redacted = sent(chat(*(f"user{n}@example.com" for n in range(12))))
    rng = random.Random(seed)
    answer = "".join(rng.choice([*placeholders(redacted), " ", "EMAIL", "_", "\\", "x"]) for _ in range(20))
    chunks, at = list[str](), 0
    for size in sizes:
        chunks.append(answer[at : at + size])
        at += size
    assert restored(redacted, [*chunks, answer[at:]]) == restored(redacted, [answer])


def test_no_more_is_held_back_than_may_be_a_placeholder() -> None:
    redacted = sent(chat(CARD))
    (card,) = placeholders(redacted)
    restorer = Restorer(redacted)
    assert restorer.piece(Piece(text="Hello, ")).text == "Hello, "
    assert restorer.piece(Piece(text=f"it is {card[:5]}")).text == "it is "
    assert restorer.piece(Piece(text=card[5:])).text == CARD
    assert restorer.piece(Piece(text="CARS")).text == "CARS"


@pytest.mark.parametrize(
    "form",
    [str.lower, str.title, lambda name: f"**{name}**", lambda name: f"`{name}`", lambda name: name.replace("_", "\\_")],
)
def test_what_a_model_makes_of_a_placeholder_is_restored(form: object) -> None:
    assert callable(form)
    redacted = sent(chat(MAIL))
    (mail,) = placeholders(redacted)
    answer = restored(redacted, [f"to {form(mail)}."])
    assert MAIL in answer
    assert answer.strip("to .*`") == MAIL


def test_an_unknown_placeholder_stays() -> None:
    redacted = sent(chat(CARD))
    (card,) = placeholders(redacted)
    assert restored(redacted, [f"{card[:-1]}9"]) == f"{card[:-1]}9"
    assert restored(sent(chat("nothing")), [card]) == card


def test_calls_are_restored_as_json() -> None:
    quoted = '"Jane \\"J\\" Doe"@example.com'
    redacted = sent(chat(f"{quoted} pay {CARD}", stop=(f"pay_{CARD}",)))
    mail = next(name for name in redacted.originals if name.startswith("EMAIL"))
    card = next(name for name in redacted.originals if name.startswith("CARD"))
    call = Called(id="c", name=f"pay_{card}", arguments=json.dumps({"to": mail, card: [f"x {card.lower()}"]}))
    (told,) = Restorer(redacted).piece(Piece(calls=(call,))).calls
    assert told.name == f"pay_{CARD}"
    assert json.loads(told.arguments) == {"to": redacted.originals[mail], CARD: [f"x {CARD}"]}


def test_text_and_reasoning_are_restored_apart() -> None:
    redacted = sent(chat(CARD))
    (card,) = placeholders(redacted)
    restorer = Restorer(redacted)
    first = restorer.piece(Piece(text=card[:4], reasoning=card[:7]))
    second = restorer.piece(Piece(text=card[4:], reasoning=card[7:]))
    assert (first.text + second.text, first.reasoning + second.reasoning) == (CARD, CARD)


def test_two_requests_at_the_same_time_never_share_a_map() -> None:
    one, other = sent(chat("ann@example.com")), sent(chat("bob@example.com"))
    first, second = Restorer(one), Restorer(other)
    (mine,), (theirs,) = one.originals, other.originals
    told = ["", ""]
    for at in range(max(len(mine), len(theirs))):
        told[0] += first.piece(Piece(text=mine[at : at + 1])).text
        told[1] += second.piece(Piece(text=theirs[at : at + 1])).text
    assert told == ["ann@example.com", "bob@example.com"]
