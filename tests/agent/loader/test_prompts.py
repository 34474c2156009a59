"""Prompts of real template shapes: what clients write never becomes a control token, and no history takes for ever."""

import json
import re
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.loader.chat.calls import OWN
from agent.loader.chat.turns import PLAIN, turns
from agent.loader.mlx.prompt import TemplateRefused
from agent.loader.mlx.template import any_of
from agent.wire.frames import Generate, Message, ToolCall
from tests.families import FOLDER, Family, known

TEMPLATE = (
    "{% for d in documents or [] %}<|im_start|>document\n{{ d.text }}<|im_end|>\n{% endfor %}"
    + (FOLDER / "json_tags" / "chat_template.jinja").read_text()
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose template takes documents."""
    folder = tmp_path_factory.mktemp("families") / "documents"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "family.toml").write_bytes((FOLDER / "json_tags" / "family.toml").read_bytes())
    return Family(folder)


def request(*messages: Message, **more: Any) -> Generate:
    """A request for an answer to messages."""
    return Generate(id=1, model="m", max_tokens=8, temperature=0.0, messages=messages, **more)


def asked(text: str) -> Generate:
    """A request that has a text wherever clients may write one: in places that look like ours, too."""
    inner = {"type": text, "role": {"description": text}, "type ": {"type": text}, "enum": [text], text: text}
    tool = {"name": "f", "description": text, "parameters": {"type": "object", "properties": inner}}
    arguments = json.dumps({"role": text, "type": {"type": text}, "function": [text], text: 1})
    called = Message(role="assistant", content=text, calls=(ToolCall(id=text, name=text, arguments=arguments),))
    said = [Message(role=role, content=text) for role in ("system", "user", "assistant", "user")]
    result = Message(role="tool", content=text, call_id=text)
    variables = json.dumps({"documents": [{"text": text, "type": text, text: text}]})
    return request(*said, called, result, said[-1], tools=(json.dumps(tool),), template_args=variables)


WORDS = ("<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|endoftext|>")
Texts = st.lists(st.sampled_from([*WORDS, "<", "|im_end|>", "\n", "system", "a", "\uf8a0", "é"]), max_size=8).map(
    "".join
)


@given(text=Texts)
@settings(max_examples=200, deadline=None)
def test_no_text_of_a_client_becomes_a_control_token(documents: Family, text: str) -> None:
    control = set(documents.template.added.values())

    def counted(text: str) -> Counter[int]:
        return Counter(token for token in documents.prompts.write(asked(text)).tokens if token in control)

    assert counted(f"x{text}x") == counted("xyx")


def refused_by(family: Family, messages: list[Message]) -> tuple[str, int]:
    """Why a conversation is refused, and how many turns were rendered to find out."""
    rendered, whole = [0], family.template.render

    def counted(turns: Any, *more: Any, **named: Any) -> str:
        rendered[0] += len(turns)
        return whole(turns, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.template, "render", counted)
        with pytest.raises(TemplateRefused) as caught:
            family.prompts.write(request(*messages))
    return str(caught.value), rendered[0]


def test_a_refusal_names_its_turn_without_rendering_the_history_for_each() -> None:
    bad = Message(role="user", content="".join(map(chr, range(0xF8A0, 0xF8B0))) + "<|im_end|>")
    history = [Message(role=("user", "assistant")[n % 2], content=f"turn {n}") for n in range(500)]
    for at in (0, 137, 500):
        why, rendered = refused_by(known("json_tags"), [*history[:at], bad, *history[at:]])
        assert why.startswith(f"messages[{at}]: ")
        assert rendered < 20 * len(history)


def test_neighbours_are_joined_once() -> None:
    said = [Message(role="user", content=str(n)) for n in range(5)]
    answers = [Message(role="assistant", content=one, reasoning=one) for one in ("", "a", "b")]
    calls = tuple(ToolCall(id=one, name=one, arguments="{}") for one in "xy")
    calling = [Message(role="assistant", content="c", calls=calls[:1]), Message(role="assistant", content="d")]
    found = turns([*said, *answers, calling[0], calling[1], said[0]], PLAIN._replace(calls="native"), OWN)
    assert [(one["role"], one["content"]) for one in found] == [
        ("user", "0\n\n1\n\n2\n\n3\n\n4"),
        ("assistant", "a\n\nb\n\nc"),
        ("assistant", "d"),
        ("user", "0"),
    ]


def test_many_neighbours_are_not_copied_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Message] = []

    def counted(message: Message, **new: Any) -> Message:
        made.append(msgspec.structs.replace(message, **new))
        return made[-1]

    monkeypatch.setattr("agent.loader.chat.turns.replace", counted)
    turns([Message(role="user", content="x") for _ in range(1000)], PLAIN, OWN)
    assert len(made) == 1


@given(words=st.lists(st.text(alphabet="<ab>", min_size=1, max_size=5), max_size=8), text=st.text(alphabet="<ab>x"))
def test_control_words_are_found_as_in_a_list_of_them(words: list[str], text: str) -> None:
    listed = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    wanted = [found.span() for found in re.finditer(listed, text)] if words else []
    assert ([found.span() for found in re.finditer(any_of(words), text)] if any_of(words) else []) == wanted


def test_thousands_of_control_words_are_not_tried_one_by_one() -> None:
    pattern = any_of([f"<unused{number}>" for number in range(1000)])
    assert pattern.count("<unused") == 1
    assert re.fullmatch(pattern, "<unused999>")
    assert any_of([]) == ""
