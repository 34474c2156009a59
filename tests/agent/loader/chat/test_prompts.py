"""Prompts of templates with one peculiarity each, through the real tokenizer."""

from pathlib import Path

import pytest

from agent.loader.mlx.prompt import TemplateRefused
from agent.wire.frames import Generate, Message
from tests.families import Family
from tests.families.cells import LONDON, PARIS, TOOLS, ask, called, said

FACTS = """about = "made by a test"
ends = ["<|end|>"]
special = ["<|end|>", "<|say|>", "<|said|>"]
normal = []

[writes]
"""
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
CALLS = (
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}"
)
END = "<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
TOLD = "{% if tools %}{{ tools | tojson }}{% endif %}"


def family(folder: Path, template: str) -> Family:
    """A family with this chat template."""
    (folder / "family.toml").write_text(FACTS)
    (folder / "chat_template.jinja").write_text(template)
    return Family(folder)


def prompt(made: Family, request: Generate) -> str:
    return made.text(made.prompts.write(request).tokens)


def test_a_template_that_needs_a_list_of_tools_gets_an_empty_one(tmp_path: Path) -> None:
    made = family(tmp_path, "{% for t in tools %}{{ t | tojson }}{% endfor %}" + TURNS + CALLS + END)
    assert prompt(made, ask(said("system", 1), said("user", 2))).count("text 0") == 2
    assert "get_weather" in prompt(made, ask(tools=TOOLS))
    assert made.talk.native


def test_calls_that_vanish_without_tools_become_text(tmp_path: Path) -> None:
    made = family(tmp_path, TOLD + TURNS + "{% if tools %}" + CALLS + "{% endif %}" + END)
    turns = (said("user", 1), called(PARIS), said("tool", 2, call_id="call_0001"))
    assert "Paris" in prompt(made, ask(*turns, tools=TOOLS))
    assert "Paris" in prompt(made, ask(*turns))


def test_a_first_call_that_vanishes_becomes_text(tmp_path: Path) -> None:
    """Tools are put into the first message, of which only the content is rendered."""
    rest = "{% set rest = messages[1:] if tools else messages %}"
    first = rest + "{% if tools %}{{ tools | tojson }}{{ messages[0].content }}{% endif %}"
    made = family(tmp_path, first + TURNS.replace("in messages", "in rest") + CALLS + END)
    assert "Paris" in prompt(made, ask(called(PARIS), said("user", 1), tools=TOOLS))


def test_text_beside_a_call_that_vanishes_in_some_places_stays(tmp_path: Path) -> None:
    """It is rendered behind questions, not behind results, which no probe of a single call sees."""
    content = "{% if not m.tool_calls or loop.previtem.role == 'user' %}{{ m.content }}{% endif %}"
    made = family(tmp_path, TOLD + TURNS.replace("{{ m.content }}", content) + CALLS + END)
    assert made.talk.lost == ()
    first, second = called(PARIS, ids=["1"], content="beside one"), called(LONDON, ids=["2"], content="beside two")
    turns = (said("user", 1), first, said("tool", 2, call_id="1"), second, said("tool", 3, call_id="2"))
    text = prompt(made, ask(*turns, tools=TOOLS))
    assert all(text.count(word) == 1 for word in ("beside one", "beside two", "Paris", "London"))


def test_tokens_around_the_text_beside_a_call_are_no_part_of_it(tmp_path: Path) -> None:
    content = "{% if m.tool_calls %}<|say|>{{ m.content }}<|said|>{% else %}{{ m.content }}{% endif %}"
    bare = CALLS.replace("<tool_call>", "").replace("</tool_call>", "")
    made = family(tmp_path, TOLD + TURNS.replace("{{ m.content }}", content) + bare + END)
    assert made.talk.form.bare
    assert set(made.talk.silent) == {"<|say|>", "<|said|>"}
    request = ask(tools=TOOLS)
    for lead in ("", "<|say|><|said|>"):
        text = lead + '{"name": "get_weather", "arguments": {"city": "Paris"}}'
        answer = made.answer(request, made.prompts.write(request), text)
        assert [call.name for call in answer.calls] == ["get_weather"]


def test_a_format_that_the_template_announces_is_used_before_one_that_nothing_announces(tmp_path: Path) -> None:
    bare = CALLS.replace("<tool_call>", "").replace("</tool_call>", "")
    told = "{% if tools %}Calls: functools[...]. {{ tools | tojson }}{% endif %}"
    made = family(tmp_path, told + TURNS + bare + END)
    assert made.talk.form.marker == "functools["


def test_a_refusal_names_the_turn_and_the_reason(tmp_path: Path) -> None:
    refused = "{% if m.role == 'assistant' %}{{ raise_exception('No answers here') }}{% endif %}"
    made = family(tmp_path, TURNS.replace("[{{", refused + "[{{") + END)
    with pytest.raises(TemplateRefused) as caught:
        prompt(made, ask(said("user", 1), said("assistant", 2), said("user", 3)))
    assert str(caught.value) == "messages[1]: the model's chat template refused this assistant message: No answers here"


def test_a_refusal_quotes_no_text_of_a_client(tmp_path: Path) -> None:
    refused = "{% if 'secret' in m.content %}{{ raise_exception('cannot take ' + m.content) }}{% endif %}"
    made = family(tmp_path, TURNS.replace("[{{", refused + "[{{") + END)
    with pytest.raises(TemplateRefused) as caught:
        prompt(made, ask(said("user", 1), Message(role="assistant", content="a secret"), said("user", 3)))
    assert "secret" not in str(caught.value)


def test_an_answer_that_vanishes_in_some_places_stays_whatever_its_words(tmp_path: Path) -> None:
    """Only marks of reasoning, where templates cut answers, excuse a loss; not the word."""
    kept = "{% if not (m.role == 'assistant' and loop.index0 == 3 and messages[0].role == 'system') %}"
    made = family(tmp_path, TURNS.replace("{{ m.content }}", kept + "{{ m.content }}{% endif %}") + END)
    assert made.talk.lost == ()
    answer = Message(role="assistant", content="I think so.")
    turns = (said("system", 1), said("user", 2), said("user", 3), answer, said("user", 4))
    assert prompt(made, ask(*turns)).count("I think so.") == 1
