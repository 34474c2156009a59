"""Limits of memory for chat templates, in the sandbox in which transformers renders them.

A template comes with a model's files, and one expression of it could take all of a machine's memory before anything
else is asked. What grows a text or a list by a factor is measured before it is made. Time is not limited here: a
template that never ends is found by the watchdog, which ends this process.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import runtime
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 64 << 20
"""Characters of a text, items of a list; and the number above which no argument of a function makes sense."""
_MOST_BITS = 1 << 16
_WIDTH = re.compile(r"\*|[0-9]{8,}")
_SIZED = (str, bytes, list, tuple)


def install() -> None:
    """Limit every sandbox of this process, before the first template is compiled."""
    sandbox: Any = ImmutableSandboxedEnvironment
    sandbox.intercepted_binops = frozenset({"*", "**", "%", "+"})
    sandbox.call_binop = _operated
    sandbox.call = _called
    sandbox.concat = staticmethod(_concat)
    joins: Any = runtime
    joins.str_join = joins.markup_join = _joined
    for name in ("center", "format", "indent", "join", "replace", "wordwrap"):
        FILTERS[name] = _filtered(name, FILTERS[name])


def _check(size: float, most: float = MOST) -> None:
    if size > most:
        raise SecurityError("the template makes too large a value")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, _SIZED) else 1


def _operated(self: Any, context: Any, operator: str, left: Any, right: Any) -> Any:
    """An operator of a template."""
    if operator == "%" and isinstance(left, str):
        _check(bool(_WIDTH.search(left)), 0)
    elif operator == "+":
        _check(_size(left) + _size(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        _check(bits * right if operator == "**" else bits + right.bit_length(), _MOST_BITS)
    elif operator == "*":
        sizes = [abs(one) if isinstance(one, int) else _size(one) for one in (left, right)]
        _check(sizes[0] * sizes[1])
    return self.binop_table[operator](left, right)


_plain_call = ImmutableSandboxedEnvironment.call


def _called(self: Any, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call in a template."""
    _arguments(args, kwargs)
    name, text = getattr(function, "__name__", ""), getattr(getattr(function, "__wrapped__", function), "__self__", "")
    if name == "replace" and len(args) > 1:
        _check(_size(text) * max(1, _size(args[1])))
    elif name == "join" and args:
        _joins(text, args[0])
    elif name in ("format", "format_map") and isinstance(text, str):
        _check(bool(_WIDTH.search(text)), 0)
    return _plain_call(self, context, function, *args, **kwargs)


def _filtered(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that measures what it is asked for."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        _arguments(args, kwargs)
        texts = [one for one in (*args, *kwargs.values()) if isinstance(one, str)]
        if name == "format":
            _check(any(_WIDTH.search(text) for text in texts), 0)
        elif name == "replace" and len(texts) > 2:
            _check(len(texts[0]) * max(1, len(texts[2])))
        elif name == "join" and len(args) > 2:
            _joins(args[2], args[1])
        return plain(*args, **kwargs)

    # how jinja passes the environment or the context is an attribute of the function
    limited.__dict__.update(vars(plain))
    return limited


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for one in (*args, *kwargs.values()):
        if isinstance(one, int):
            _check(abs(one))


def _joins(between: Any, parts: Any) -> None:
    if isinstance(parts, list | tuple | range):
        _check(sum(map(_size, parts)) + _size(between) * len(parts))


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
