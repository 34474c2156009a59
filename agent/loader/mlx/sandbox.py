"""Limits of memory for chat templates, in the sandbox in which transformers renders them.

A template comes with a model's files, and one expression of it could take all of a machine's memory before anything
else is asked. What grows a text or a list by a factor is measured before it is made; any other number is only a number,
such as the time in seconds. Time is not limited here: a template that never ends is found by ``cpu_limit`` at the
start and by the watchdog, which ends this process, later.
"""

import math
import re
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any

from jinja2 import runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 64 << 20
"""Characters of a text, items of a list."""
_MOST_BITS = 1 << 16
_MOST_INDENT = 32
"""Characters by which JSON is indented, or that are written between two of its values."""
_SIZED = (str, bytes, list, tuple)
_CONVERSION = re.compile(
    r"%%|%(?:\([^()]*(?P<nested>\()|(?:\([^()]*\))?[-#0 +]*(?P<width>\*|[0-9]*)(?:\.(?P<precision>\*|[0-9]*))?)"
)
"""A conversion of the operator ``%``; its key may be ``nested`` in parentheses, which nobody writes."""


def install() -> None:
    """Limit every sandbox of this process, before the first template is compiled."""
    sandbox: Any = ImmutableSandboxedEnvironment
    sandbox.intercepted_binops = frozenset({"*", "**", "%", "+"})
    sandbox.call_binop = _operated
    sandbox.call = _called
    sandbox.concat = staticmethod(_concat)
    sandbox.from_string = _from_string
    joins: Any = runtime
    joins.str_join = joins.markup_join = _joined


def _check(size: float, most: float | None = None) -> None:
    if size > (MOST if most is None else most):
        raise SecurityError("the template makes too large a value")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, _SIZED) else 1


def _width(value: Any) -> int:
    """What a size in an argument amounts to: of a number, or of the text that is written so often."""
    return abs(value) if isinstance(value, int) else _size(value)


def _operated(self: Any, context: Any, operator: str, left: Any, right: Any) -> Any:
    """An operator of a template."""
    if operator == "%" and isinstance(left, str | bytes):
        _percent(left)
    elif operator == "+":
        _check(_size(left) + _size(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        _check(bits * right if operator == "**" else bits + right.bit_length(), _MOST_BITS)
    elif operator == "*":
        _check(_width(left) * _width(right))
    return self.binop_table[operator](left, right)


def _percent(text: str | bytes) -> None:
    """What ``text % ...`` adds to its values."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    for found in _CONVERSION.finditer(text):
        wide = (found["width"] or "0", found["precision"] or "0")
        _check(bool(found["nested"]) or "*" in wide, 0)
    _check(sum(int(wide or 0) for found in _CONVERSION.finditer(text) for wide in found.group("width", "precision")))


def _format(text: str) -> None:
    """What ``text.format(...)`` adds to its values. Raises ValueError as that would for a text that is not a format."""
    specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
    _check(any("{" in spec for spec in specs), 0)  # a width among the values
    _check(sum(int(wide) for spec in specs for wide in re.findall(r"\d+", spec)))


_plain_call = ImmutableSandboxedEnvironment.call


def _called(self: Any, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A call in a template."""
    name, of = getattr(function, "__name__", ""), getattr(getattr(function, "__wrapped__", function), "__self__", None)
    if name == "generate_lorem_ipsum":
        _check(1000 * math.prod(max(1, _width(one)) for one in (*args, *kwargs.values())))
    elif isinstance(of, str | bytes | int) and (args or kwargs):
        args = _method(name, of, args, kwargs)
    return _plain_call(self, context, function, *args, **kwargs)


def _method(name: str, of: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Measure a method of a text or a number; returns the arguments to call it with."""
    if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
        _check(max(map(_width, (*args, *kwargs.values()))))
    elif name == "expandtabs":
        _check(_size(of) * max(map(_width, (*args, *kwargs.values()))))
    elif name == "replace" and len(args) > 1:
        _check(_size(of) * max(1, _size(args[1])))
    elif name == "join" and args:
        return (_joins(of, args[0]), *args[1:])
    elif name in ("format", "format_map") and isinstance(of, str):
        _format(of)
    return args


def _from_string(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Compile a template: its filters are bound here, those of transformers too."""
    for name, check in _FILTERS.items():
        if not hasattr(plain := self.filters[name], "measured"):
            self.filters[name] = _filtered(plain, check)
    return _plain_from_string(self, *args, **kwargs)


_plain_from_string = ImmutableSandboxedEnvironment.from_string


def _filtered(plain: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that measures what it is asked for. ``check`` is given its arguments without the first, if jinja passes
    the environment there, and may return another value to filter."""
    passed = 1 if hasattr(plain, "jinja_pass_arg") else 0

    def measured(*args: Any, **kwargs: Any) -> Any:
        value = check(*args[passed:], **kwargs)
        if value is not None:
            args = (*args[:passed], value, *args[passed + 1 :])
        return plain(*args, **kwargs)

    # how jinja passes the environment or the context is an attribute of the function
    measured.__dict__.update(vars(plain), measured=True)
    return measured


def _filter_indent(text: Any, /, width: Any = 4, *_: Any, **__: Any) -> None:
    _check(_width(width) * (str(text).count("\n") + 1))


def _filter_wide(value: Any, /, *sizes: Any, **more: Any) -> None:
    _check(max(map(_width, (*sizes, *more.values())), default=0))


def _filter_wordwrap(
    text: Any, width: Any = 79, breaks: Any = True, wrapstring: Any = None, *_: Any, **__: Any
) -> None:
    _check(_size(text) * max(1, _size(wrapstring or "\n")))


def _filter_round(value: Any, /, precision: Any = 0, *_: Any, **__: Any) -> None:
    _check(_width(precision), _MOST_BITS / 4)


def _filter_tojson(value: Any, /, *given: Any, **more: Any) -> None:
    for one in (*given, *more.values()):
        _check(sum(map(_width, one)) if isinstance(one, list | tuple) else _width(one), _MOST_INDENT)


def _filter_replace(text: Any, /, old: Any, new: Any, *_: Any, **__: Any) -> None:
    _check(len(str(text)) * max(1, len(str(new))))


def _filter_join(parts: Any, /, d: Any = "", *_: Any, **__: Any) -> Any:
    return _joins(d, parts)


_FILTERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("center", "batch", "slice"), _filter_wide),
    "indent": _filter_indent,
    "wordwrap": _filter_wordwrap,
    "round": _filter_round,
    "tojson": _filter_tojson,
    "replace": _filter_replace,
    "join": _filter_join,
    "format": lambda text, /, *_, **__: _percent(str(text)),
}


def _joins(between: Any, parts: Any) -> Any:
    """The parts that are joined, which may have been yet to come."""
    held = parts if isinstance(parts, str | dict | list | tuple | range) else list(parts)
    _check(sum(map(_size, held)) + _size(between) * len(held))
    return held


def _concat(parts: Iterable[str]) -> str:
    """The text of a template, from its pieces."""
    held, size = [], 0
    for part in parts:
        size += len(part)
        _check(size)
        held.append(part)
    return "".join(held)


def _joined(parts: Any) -> str:
    """The operator ``~``."""
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)
