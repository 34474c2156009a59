"""What a constraint masks, whatever tokens the model writes an answer in."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from agent.loader.chat.calls import OWN, CallFormat, written
from agent.loader.chat.grammar import Plan, announced, literal
from agent.loader.mlx.constraint import Constraint
from tests.agent.loader.chat.test_grammar import BARE, LISTED, NESTED, TOOLS

FORMATS = {"tagged": OWN, "bare": BARE, "listed": LISTED, "nested": NESTED}
END = 256


class Vocabulary:
    """A token for each byte, one that ends an answer, and one for each piece."""

    bos_token_id = None
    eos_token_id = END
    special_token_ids = (END,)

    def __init__(self, pieces: Iterable[str]) -> None:
        longer = [one.encode() for one in dict.fromkeys(pieces) if len(one) > 1]
        self.tokens = [*(bytes([n]) for n in range(END)), b"<end>", *longer]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.tokens[token] for token in tokens).decode(errors="ignore")


def masked(form: CallFormat, answer: str, pieces: Iterable[str]) -> int | None:
    """Where an answer in free text cannot go on, its end included. It is written in the longest tokens allowed, since
    llguidance allows only some where only one text is possible."""
    known = Vocabulary(pieces)
    grammars = LLTokenizer(TokenizerWrapper(known))

    def matcher(grammar: str, begun: str = "") -> LLMatcher:
        found = LLMatcher(grammars, grammar, log_level=0)
        assert not found.is_error()
        if begun:
            found.consume_tokens(grammars.tokenize_str(begun))
        return found

    plan = announced(TOOLS, form, literal)
    constraint = Constraint(plan, 0, [END], matcher, known.text, None, inside=False)
    made, left = list[int](), answer.encode()
    while True:
        logits = constraint(mx.array(made, dtype=mx.int32), mx.zeros((1, len(known.tokens))))
        wanted = [n for n, token in enumerate(known.tokens) if n != END and left.startswith(token)] if left else [END]
        allowed = [n for n in wanted if not mx.isinf(logits[0, n])]
        if not allowed or not left:
            return None if allowed else len(answer) - len(left)
        made.append(max(allowed, key=lambda n: len(known.tokens[n])))
        left = left[len(known.tokens[made[-1]]) :]


def cut(text: str, places: Iterable[int]) -> list[str]:
    at = [0, *sorted(place for place in places if 0 < place < len(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(at)]


@pytest.mark.parametrize("name", FORMATS)
@given(st.sets(st.integers(1, 90), max_size=12), st.sampled_from(["Oslo", "Paris"]))
@settings(deadline=None, max_examples=40)
def test_a_call_is_constrained_in_any_tokens(name: str, places: set[int], town: str) -> None:
    form = FORMATS[name]
    answer = written(form, [("weather", {"town": town})])
    value = answer.index(town)
    found = masked(form, answer, [*cut(answer[:value], places), *cut(answer[value:], {at - value for at in places})])
    assert found == (None if town == "Oslo" else value)


def test_a_token_that_begins_no_known_call_is_text() -> None:
    for form, pieces in (
        (OWN, ["<tool_call> is what", " begins"]),
        (BARE, ['{"name": "for', 'ecast", "parameters": 1}']),
    ):
        assert masked(form, "".join(pieces), pieces) is None


def test_a_token_that_holds_a_whole_call_may_be_followed_by_text() -> None:
    call = written(OWN, [("clock", {})])
    assert masked(OWN, f"{call}\ntext", [call]) is None


def test_json_in_the_middle_of_an_answer_is_no_bare_call() -> None:
    """However long the answer, of which only the end is kept: wherever that begins."""
    example = ['{"name": "', "weather", '", "parameters": {"town": "Paris"}}']
    for lines in range(1, 25):
        answer = "line" * lines + "".join(example) * 40
        assert masked(BARE, answer, [*example, "line"]) is None


@given(st.integers(0, 1500))
@settings(deadline=None, max_examples=20)
def test_reasoning_of_any_length_is_searched_in_its_last_part(length: int) -> None:
    sizes = []

    def text(tokens: Sequence[int]) -> str:
        sizes.append(len(tokens))
        return bytes(tokens).decode()

    def matcher(grammar: str) -> LLMatcher:
        return LLMatcher(LLTokenizer("byte"), grammar, log_level=0)

    plan = Plan(whole='start: "x"')
    constraint = Constraint(plan, 0, [END], matcher, text, ("<think>", "</think>"), inside=True)
    thoughts = list(b"." * length + b"</think>")
    free = constraint(mx.array(thoughts[:-1], dtype=mx.int32), mx.zeros((1, END + 1)))
    assert not bool(mx.any(mx.isinf(free)))
    held = constraint(mx.array(thoughts, dtype=mx.int32), mx.zeros((1, END + 1)))
    assert [n for n in range(END) if not mx.isinf(held[0, n])] == [ord("x")]
    assert max(sizes) < 600
