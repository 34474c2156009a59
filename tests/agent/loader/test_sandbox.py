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
    f"{{{{ '%(a)-{MANY}d' % {{'a': 1}} }}}}",
    f"{{{{ '%(a(b))-{MANY}d' % {{'a(b)': 1}} }}}}",
    f"{{{{ '%.{MANY}f' % 1 }}}}",
    f"{{{{ '%.*f' % ({MANY}, 1) }}}}",
    f"{{{{ '%{MANY}d'.encode() % 1 }}}}",
    "{{ ('%9999d' * 2000) % ((1,) * 2000) }}",
    "{{ ('{0:9999}' * 2000).format(1) }}",
    f"{{{{ '{{a:>{MANY}}}'.format_map({{'a': 1}}) }}}}",
    f"{{% set width = {MANY} %}}{{{{ 'x'.rjust(width) }}}}",
    f"{{{{ 'x'.zfill({MANY}) }}}}",
    f"{{{{ 'x'.encode().ljust({MANY}) }}}}",
    "{{ ('\\t' * 100000).expandtabs(100000) }}",
    f"{{{{ (1).to_bytes({MANY}, 'big') }}}}",
    f"{{{{ ('x'|attr('center'))({MANY}) }}}}",
    f"{{{{ ['x']|map('center', {MANY})|list }}}}",
    f"{{{{ [1]|batch({MANY}, 0)|list }}}}",
    f"{{{{ [1]|slice({MANY})|list }}}}",
    f"{{{{ 1.5|round({MANY}, 'floor') }}}}",
    f"{{{{ messages|tojson(indent={MANY}) }}}}",
    "{{ range(99999)|list|tojson(separators=('x' * 9999, 'y')) }}",
    f"{{{{ lipsum({MANY}) }}}}",
    "{{ ('\\n' * 100000)|indent(100000, true, true) }}",
    S + "{{ s|wordwrap(1, wrapstring=s) }}",
    S + "{{ s.join(range(99999)|map('string')) }}",
    S + "{{ range(99999)|map('string')|join(s) }}",
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
        # a number is only a number, wherever it is no size: the time, an id
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1700000000) }}", "<1700000000>"),
        ("{% macro m(context, function) %}{{ function }}{% endmacro %}{{ m(context=2, function=3) }}", "3"),
        ("{{ '%(text)s'|format(text=1, name=2) }}{{ '{value}'.format(value=1, of=2, name=3) }}", "11"),
        ("{{ {}.get('k', 2147483647) }}{{ [2147483647].count(2147483647) }}", "21474836471"),
        ("{{ '{a}|{:>4}|{:,}'.format(1700000000, 1700000000, a=1700000000) }}", "1700000000|1700000000|1,700,000,000"),
        ("{{ 1700000000|center(3) }}{{ 1700000000|string|replace('17', '1') }}", "1700000000100000000"),
        ("{{ [1700000000, 2]|join('-') }}{{ 1700000000|tojson }}", "1700000000-21700000000"),
        ("{% set n = namespace(a=1700000000) %}{{ n.a }}{{ dict(a=1700000000).a }}", "17000000001700000000"),
        # only a format's own conversions have widths
        ("{{ '%s: %s'|format('user', '**bold** 12345678') }}", "user: **bold** 12345678"),
        ("{{ '**%s** 12345678 %d%%' % ('x', 1700000000) }}", "**x** 12345678 1700000000%"),
        ("{{ '**{}** 12345678 {{}}'.format('x') }}", "**x** 12345678 {}"),
        ("{{ '100% (see f(x)) 12345678 * %s'|replace('% ', '%% ') % 'x' }}", "100% (see f(x)) 12345678 * x"),
        ("{{ '%(a)s (12345678) %(b)5.1f' % {'a': 'x', 'b': 1} }}", "x (12345678)   1.0"),
        ("{{ '%-4s|%+05d' % ('x', 7) }}{{ '{:-^5}|{x:05.1f}'.format('y', x=1.25) }}", "x   |+0007--y--|001.2"),
        ("{{ messages|tojson(indent=2)|length }}{{ {'a': 1}|tojson(indent=4) }}", '51{\n    "a": 1\n}'),
        ("{{ ['b', 'a']|sort|join('-') }}{{ messages|map('string')|join|length }}", "a-b33"),
        ("{{ ', '.join(messages|map(attribute='content')) }}{{ 'a\tb'.expandtabs(2) }}", "hia b"),
        ("{{ 'a b'|wordwrap(1) }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ 2.567|round(2) }}", "a\nb[[1, 2], [3, 0]]2.57"),
    ],
)
def test_what_templates_write_is_unchanged(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_a_long_conversation_is_no_large_value() -> None:
    text: Any = "x" * (10 << 20)
    assert len(rendered("{{ messages[0].content + messages[0].content ~ '' }}", text)) == 20 << 20
