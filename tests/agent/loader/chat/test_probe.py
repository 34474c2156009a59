"""What is found out from a chat template: small ones, each with one peculiarity."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agent.loader.chat.calls import OWN
from agent.loader.chat.efforts import Switch
from agent.loader.chat.probe import Conversation, Traits, probed
from agent.loader.chat.turns import Turn

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOLD = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function %}CALL{% endfor %}<|end|>{% endfor %}"
)
TOKENS = frozenset({"<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"})


def _refuse(said: str) -> None:
    raise TemplateError(said)


def found(source: str, *, tokens: frozenset[str] = TOKENS, **more: Any) -> Conversation:
    """What the probe finds out about a template."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(source)

    def render(
        turns: Sequence[Turn], tools: Sequence[Turn] | None, variables: Mapping[str, Any], *, begin_answer: bool
    ) -> str:
        return template.render(messages=turns, tools=tools, add_generation_prompt=begin_answer, **variables)

    return probed(render, Traits(tokens=tokens, ends=("<|end|>",), source=source, **more))


REFUSED = "{{ raise_exception('no') }}"
ONE_SYSTEM = "{% if m.role == 'system' and not loop.first %}" + REFUSED + "{% endif %}"
IN_TURNS = "{% if loop.previtem and loop.previtem.role == m.role %}" + REFUSED + "{% endif %}"
NO_EMPTY = "{% if m.role == 'assistant' and not m.content %}" + REFUSED + "{% endif %}"
NO_LATER = "{% if m.role == 'system' and not loop.first %}{% continue %}{% endif %}"


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        (TURNS, {"calls": "text"}),
        ("{% if messages[0].role == 'system' %}" + REFUSED + "{% endif %}" + TURNS, {"system": "folded"}),
        (TURNS.replace("<|{{", ONE_SYSTEM + "<|{{"), {"systems": "joined", "later": "user"}),
        (TURNS.replace("<|{{", NO_LATER + "<|{{"), {"systems": "joined", "later": "user"}),
        (TURNS.replace("<|{{", IN_TURNS + "<|{{"), {"neighbours": "joined", "systems": "joined"}),
        (TURNS.replace("<|{{", NO_EMPTY + "<|{{"), {"empty": "dropped"}),
    ],
)
def test_a_template_decides_how_turns_are_changed(source: str, changed: dict[str, str]) -> None:
    manner = found(source + BEGIN).manner
    assert {key: getattr(manner, key) for key in changed} == changed


@pytest.mark.parametrize(
    ("call", "written"),
    [
        (
            '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>',
            ("<tool_call>", "</tool_call>", '<tool_call>{"name": "'),
        ),
        (
            '<call>[{"tool": "x", "name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}]</call>',
            ("<call>", "</call>", '[{"tool": "x", "name": "'),
        ),
        ("<fn>{{ c.function.name }}<args>{{ c.function.arguments | tojson }}</fn>", ("<fn>", "</fn>", "<fn>")),
    ],
)
def test_a_call_is_learnt_from_how_it_is_rendered(call: str, written: tuple[str, str, str]) -> None:
    talk = found(TOLD + CALLS.replace("CALL", call) + BEGIN)
    form = talk.form
    assert (talk.native, form.marker, form.stop) == (True, *written[:2])
    assert written[2] in form.begin + form.open


def test_a_format_that_nothing_announces_and_nothing_tells_from_text_is_not_used() -> None:
    plain = "{{ c.function.name }}\n{{ c.function.arguments | tojson }}>>>"
    talk = found(TOLD + CALLS.replace("CALL", plain) + BEGIN)
    assert (talk.native, talk.form) == (False, OWN)


def test_where_the_tools_stand_does_not_matter() -> None:
    """A template that describes tools in the last question moves them when an answer follows."""
    source = (
        "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{% for m in messages %}"
        "{% if tools and m == last and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        '[CALL]{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}<|end|>'
        "{% endfor %}"
    )
    form = found(source + BEGIN, tokens=TOKENS | {"[CALL]"}).form
    assert (form.marker, form.begin + form.open) == ("[CALL]", '[CALL]{"name": "')


def test_templates_that_only_switch_reasoning_have_the_usual_marks() -> None:
    source = "{% if enable_thinking %}Think first.{% endif %}" + TURNS + BEGIN
    talk = found(source, variables=frozenset({"enable_thinking"}))
    assert (talk.switch, talk.reasoning) == (Switch("enable_thinking", True, False), ("<think>", "</think>"))
    assert found(TURNS + BEGIN).reasoning is None


@pytest.mark.parametrize(
    ("source", "variable", "wanted"),
    [
        ("{% if no_thinking %}<think></think>{% endif %}", "no_thinking", Switch("no_thinking", False, True)),
        (
            "{% if thinking_budget == 0 %}<think></think>{% endif %}",
            "thinking_budget",
            Switch("thinking_budget", None, 0),
        ),
        (
            "{% if effort not in ('no_think', 'high') %}{{ raise_exception('no') }}{% endif %}{{ effort }}",
            "effort",
            Switch("effort", None, "no_think"),
        ),
        ("{{ reasoning_effort }}", "reasoning_effort", None),
        ("{{ thinking_tokens }}", "thinking_tokens", Switch("thinking_tokens", True, False)),
    ],
)
def test_what_switches_reasoning_is_found(source: str, variable: str, wanted: Switch | None) -> None:
    assert found(TURNS + BEGIN + source, variables=frozenset({variable})).switch == wanted


def test_efforts_are_those_that_the_template_takes() -> None:
    refused = "{% if effort and effort not in ('low', 'high') %}{{ raise_exception('no') }}{% endif %}{{ effort }}"
    assert found(TURNS + BEGIN + refused, variables=frozenset({"effort"})).efforts == ("effort", ("low", "high"))
    assert found(TURNS + BEGIN, variables=frozenset({"effort"})).efforts is None


@pytest.mark.parametrize("tag", ["<think>", "<mm:think>", "<think:open>", "<thought>", "<reasoning>"])
def test_reasoning_is_known_by_the_tag_that_an_answer_begins_with(tag: str) -> None:
    for opened in (f"{tag}\n", f"{tag}</{tag[1:]}"):
        source = TURNS + BEGIN.replace("<|assistant|>", "<|assistant|>" + opened)
        assert found(source).reasoning == (tag, f"</{tag[1:]}")


def test_tokens_around_an_answer_are_known_where_only_tools_bring_them() -> None:
    tokens = TOKENS | {"<|say|>", "<|said|>"}
    source = (
        TOLD + "{% for m in messages %}<|{{ m.role }}|>"
        "{% if tools and m.role == 'assistant' %}<|say|>{{ m.content }}<|said|>"
        "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + BEGIN
    )
    assert set(found(source, tokens=tokens).silent) == {"<|say|>", "<|said|>"}


def test_a_template_that_takes_one_call_in_a_turn_gets_one() -> None:
    one = "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    call = '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    source = TOLD + CALLS.replace("CALL", call).replace("<|{{", one + "<|{{") + BEGIN
    talk = found(source)
    assert (talk.manner.parallel, talk.form.several) == ("split", False)


def test_arguments_between_tags_may_be_several_calls() -> None:
    call = (
        "<tool_call><function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></tool_call>"
    )
    talk = found(TOLD + CALLS.replace("CALL", call) + BEGIN)
    assert talk.form.key is not None
    assert talk.form.several


def test_a_template_that_refuses_everything_loses_everything() -> None:
    talk = found("{{ raise_exception('never') }}")
    assert len(talk.lost) == 6
    assert (talk.native, talk.form, talk.manner.calls) == (False, OWN, "text")


def _unreading(text: str, tools: Any) -> Any:
    raise ValueError(text)


def test_a_parser_that_does_not_read_what_is_rendered_is_not_used() -> None:
    tokens, parsers = TOKENS | {"<|call|>"}, (("<|call|>", "<|called|>", _unreading),)
    call = "<|call|>{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}='{{ v }}'{% endfor %})<|called|>"
    talk = found(TOLD + CALLS.replace("CALL", call) + BEGIN, tokens=tokens, parsers=parsers)
    assert (talk.native, talk.form) == (False, OWN)
    dropped = found(TOLD + TURNS + BEGIN, tokens=tokens, parsers=parsers)
    assert (dropped.native, dropped.form.parser) == (True, _unreading)


USUAL, EVERY = ("low", "medium", "high"), ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ANY = tuple(effort for effort in EVERY if effort != "low")


@pytest.mark.parametrize(
    ("shown", "taken"),
    [
        ("{{ 'Effort: ' + (reasoning_effort or '') }}", USUAL),
        ("{{ 'Off' if reasoning_effort == 'none' else 'Effort: ' + (reasoning_effort or '') }}", ("none", *USUAL)),
        ("{% if reasoning_effort in ['low', 'qeffortword'] %}" + REFUSED + "{% endif %}{{ reasoning_effort }}", ANY),
        ("{{ 'Hard' if reasoning_effort == 'max' else 'Soft' }}", EVERY),
    ],
)
def test_an_effort_that_is_only_copied_into_the_prompt_has_to_be_a_usual_one(
    shown: str, taken: tuple[str, ...]
) -> None:
    variable = "{% set reasoning_effort = reasoning_effort if reasoning_effort is defined else none %}"
    talk = found(variable + shown + TURNS, variables=frozenset({"reasoning_effort"}))
    assert talk.efforts == ("reasoning_effort", taken)
