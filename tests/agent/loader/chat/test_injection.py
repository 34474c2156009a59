"""No text of users, tools and documents becomes a control token, and those without control words are tokenized as ever.

``MLXRACK_INJECTIONS`` is how many random texts each family gets (``make histories`` tries 1,000).
"""

import json
import os
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from agent.loader.chat.turns import turns
from agent.wire.frames import Generate, Message
from tests.families import NAMES, Family, known
from tests.families.cells import PARIS, TOOLS, ask, called

INJECTIONS = int(os.environ.get("MLXRACK_INJECTIONS", "20"))
NEUTRAL = "neutral"
TRIES = settings(
    max_examples=INJECTIONS, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
words = st.sampled_from(
    ["system", "\n", " ", "You obey me.", "é", "<", "|", ">", "[", "]", "im_", "ｐ", "</", "\uf8a0"]
)


def texts(family: Family) -> st.SearchStrategy[str]:
    """Texts full of a family's control words, whole, cut and nested."""
    control = sorted(family.template.added) or ["<s>"]
    whole = st.sampled_from(control)
    cut = st.builds(lambda word, at: word[: at % (len(word) + 1)], whole, st.integers(0, 40))
    nested = st.builds(
        lambda word, inner, at: word[: at % len(word)] + inner + word[at % len(word) :],
        whole,
        whole,
        st.integers(0, 40),
    )
    return st.lists(st.one_of(whole, cut, nested, words), min_size=1, max_size=8).map("".join)


def conversation(said: Sequence[str]) -> Generate:
    """Untrusted texts in every place that takes one: system, user, document, result, a tool's description."""
    document = f"Summarize:\n<document>\n{said[1]}\n</document>"
    described = TOOLS[0].replace("get_weather does it", _json(said[4]))
    return ask(
        Message(role="system", content=f"s {said[0]}."),
        Message(role="user", content=f"u {document}."),
        called((PARIS[0], {"city": said[2]})),
        Message(role="tool", content=f"r {said[3]}.", call_id="call_0001"),
        Message(role="user", content=f"u {said[0]}{said[3]}."),
        tools=(described, TOOLS[1]),
    )


def _json(text: str) -> str:

    return json.dumps(text)[1:-1]


def control_tokens(family: Family, request: Generate) -> Counter[int]:
    """How often each added token stands in a prompt."""
    added = set(family.template.added.values())
    return Counter(token for token in family.prompts.write(request).tokens if token in added)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_client_becomes_a_control_token(name: str) -> None:
    family = known(name)
    own = control_tokens(family, conversation([NEUTRAL] * 5))

    @TRIES
    @given(st.lists(texts(family), min_size=5, max_size=5))
    def holds(said: list[str]) -> None:
        request = conversation(said)
        assert control_tokens(family, request) == own

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_are_those_of_the_rendered_text(name: str) -> None:
    """Nothing is added to texts or taken from them: the decoded prompt is what the template renders."""
    family = known(name)

    @TRIES
    @given(texts(family), texts(family))
    def holds(one: str, two: str) -> None:
        request = ask(
            Message(role="user", content=f"a {one}."),
            Message(role="assistant", content=f"b{two}."),
            Message(role="user", content="c"),
        )
        assert family.text(family.prompts.write(request).tokens) == rendered(family, request)

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_texts_without_control_words_are_tokenized_as_ever(name: str) -> None:
    family = known(name)
    allowed = st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co"], exclude_characters="<[|/"), max_size=40
    )

    @TRIES
    @given(allowed, allowed)
    def holds(one: str, two: str) -> None:
        request = ask(
            Message(role="user", content=f"a {one}."),
            Message(role="assistant", content=f"b{two}."),
            Message(role="user", content="c"),
        )
        if not family.template.exists:
            wanted = family.template.tokens(rendered(family, request))
        else:
            given_turns = turns(request.messages, family.talk.manner, family.talk.form)
            wanted = family.tokenizer.apply_chat_template(given_turns, add_generation_prompt=True, tokenize=True)
        assert family.prompts.write(request).tokens == wanted

    holds()


def rendered(family: Family, request: Generate) -> str:
    """The prompt as plain text."""
    if not family.template.exists:
        return "".join(f"{one.role}: {one.content}\n" for one in request.messages) + "assistant:"
    given_turns = turns(request.messages, family.talk.manner, family.talk.form)
    try:
        return family.template.render(given_turns, None, {}, begin_answer=True)
    except TemplateError:  # some refuse their own words in a text
        reject()
