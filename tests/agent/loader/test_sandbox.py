"""Templates that would take all memory are refused before they do; those that models have are rendered as ever."""

from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from agent.loader.mlx import sandbox
from agent.loader.mlx import template as installs

MANY = 3_000_000_000
S = "{% set s = 'x' * 100000 %}"
LARGE = [
    f"{{{{ 'x' * {MANY} }}}}",
    f"{{{{ {MANY} * 'x' }}}}",
    f"{{{{ [0] * {MANY} }}}}",
    "{{ 9999 ** 999999 }}",
    f"{{{{ '%{MANY}d' % 1 }}}}",
    f"{{{{ '%*d' % ({MANY}, 1) }}}}",
    f"{{{{ '{{:{MANY}}}'.format(1) }}}}",
    f"{{{{ '{{0:{{1}}}}'.format(1, {MANY}) }}}}",
    f"{{{{ 'x'.center({MANY}) }}}}",
    f"{{{{ 'x'.ljust({MANY}) }}}}",
    f"{{{{ 'x'|center({MANY}) }}}}",
    f"{{{{ 'x'|indent({MANY}, true) }}}}",
    f"{{{{ '%{MANY}d'|format(1) }}}}",
    "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    S + "{{ s.replace('x', s) }}",
    S + "{{ s|replace('x', s) }}",
    S + "{{ s.join([s] * 99999) }}",
    S + "{{ range(99999)|join(s) }}",
    S + "{% for i in range(99999) %}{{ s }}{% endfor %}",
]


def rendered(source: str, content: str = "hi") -> str:
    found: Any = render_jinja_template([[{"role": "user", "content": content}]], chat_template=source)
    return str(found[0][0])


@pytest.mark.parametrize("source", LARGE)
def test_a_template_that_makes_too_much_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installs.ChatTemplate is not None
    monkeypatch.setattr(sandbox, "MOST", 1 << 20)  # nothing is to be taken where a limit is gone
    with pytest.raises(SecurityError, match="too large a value"):
        rendered(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{{ '%s %d' % ('a', 3) }}{{ 2 * 3 }}{{ 7 % 4 }}{{ 1 + 2 }}{{ 2 ** 8 }}{{ 1.5 * 2 }}{{ 1.5 + 1 }}",
            "a 36332563.02.5",
        ),
        ("{{ 'a' * 3 }}{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 'x' ~ 1 ~ none }}", "aaa[1, 2]abx1None"),
        ("{{ 'a-b'.replace('-', '+') }}{{ ['a', 'b']|join(', ') }}{{ 'a\nb'|indent(2) }}", "a+ba, ba\n  b"),
        ("{{ ', '.join(['a', 'b']) }}{{ '{} {x}'.format(1, x=2) }}{{ 'x'|center(3) }}|", "a, b1 2 x |"),
        ("{{ messages|map(attribute='content')|join }}{{ messages[0]['content']|trim }}", "hihi"),
        ("{{ messages|tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{% for m in messages %}{{ m.content * loop.index }}{% endfor %}", "hi"),
    ],
)
def test_what_templates_write_is_unchanged(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_a_long_conversation_is_no_large_value() -> None:
    text: Any = "x" * (10 << 20)
    assert len(rendered("{{ messages[0].content + messages[0].content ~ '' }}", text)) == 20 << 20
