"""What of an answer is withheld, the same at every split of the stream."""

import pytest

from agent.policy.outgoing import Called, Piece
from agent.policy.redaction.withholding import HELD_CHARS, MARKER, Withholder
from agent.policy.rules import Content
from shared.errors import Retryable

KEY = "ghp_1234567890abcdefghijklmnopqrstuvwxYZ"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7Xw3aB3d\n" * 40 + "-----END RSA PRIVATE KEY-----"


def told(content: Content, chunks: list[str]) -> tuple[str, Withholder]:
    withholder = Withholder(content)
    text = "".join(withholder.piece(Piece(text=one)).text for one in chunks)
    return text + withholder.end().text, withholder


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40, 10_000])
def test_secrets_are_withheld_at_every_split(size: int) -> None:
    answer = f"Use {KEY} and {PEM} or sk-{'aB3dE6gH' * 4}; {KEY[:9]} is none. Good-bye"
    text, withholder = told(Content(secrets=True), [answer[n : n + size] for n in range(0, len(answer), size)])
    assert text == f"Use {MARKER} and {MARKER} or {MARKER}; {KEY[:9]} is none. Good-bye"
    assert withholder.withheld == 3
    assert withholder.finish("stop") == "content_filter"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_patterns_are_withheld_across_words(size: int) -> None:
    answer = "The code name is Blue Heron, yes. BlueHeron"
    text, withholder = told(
        Content(patterns=(r"Blue\s+Heron",)), [answer[n : n + size] for n in range(0, len(answer), size)]
    )
    assert text == f"The code name is {MARKER}, yes. BlueHeron"
    assert withholder.withheld == 1


def test_without_a_finding_nothing_changes() -> None:
    text, withholder = told(Content(secrets=True), ["Hello ", "wor", "ld, 你好", " sk", "ill"])
    assert text == "Hello world, 你好 skill"
    assert withholder.finish("tool_calls") == "tool_calls"
    same = Piece(text="x", calls=(Called(id="1", name="f", arguments="{}"),))
    assert Withholder(Content()).piece(same) is same


def test_what_is_held_back_is_bounded() -> None:
    withholder, sent, text = Withholder(Content(patterns=("begin.*end",))), 0, ""
    for _ in range(HELD_CHARS // 5):
        text += withholder.piece(Piece(text="begin and ")).text
        sent += 10
    assert sent - len(text) <= HELD_CHARS + 10
    text += withholder.end().text
    assert text == "begin and " * (sent // 10)


def test_a_private_key_without_an_end_is_withheld_as_far_as_it_goes() -> None:
    cut = PEM[: len(PEM) // 2]
    text, withholder = told(Content(secrets=True), [f"key: {cut[:50]}", cut[50:]])
    assert text == f"key: {MARKER}"
    assert withholder.withheld == 1


def test_reasoning_and_calls_are_filtered_too() -> None:
    withholder = Withholder(Content(secrets=True))
    call = Called(id="1", name="f", arguments=f'{{"key": "{KEY}"}}')
    first = withholder.piece(Piece(reasoning=f"I know {KEY} ", calls=(call,)))
    rest = withholder.end()
    assert first.reasoning + rest.reasoning == f"I know {MARKER} "
    assert first.calls[0].arguments == f'{{"key": "{MARKER}"}}'
    assert withholder.finish("tool_calls") == "content_filter"


def test_a_pattern_that_takes_too_long_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.policy.redaction.withholding._TIME_OUT_S", 0.05)
    with pytest.raises(Retryable) as raised:
        told(Content(patterns=(r"(?:a|a)+\d\d$",)), ["a" * 80, "!"])
    assert raised.value.code == "analysis_failed"
