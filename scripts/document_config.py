"""``make docs``: generates the tables of docs/configuration.md and docs/policy.md from the code that reads them."""

import sys
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from agent.config import AgentConfig
from agent.policy.rules import Rules
from aggregator.config import AggregatorConfig

DOCS = Path(__file__).parent.parent / "docs"
GENERATED: tuple[tuple[str, str, type[msgspec.Struct]], ...] = (
    ("configuration.md", "agent", AgentConfig),
    ("configuration.md", "aggregator", AggregatorConfig),
    ("policy.md", "policy", Rules),
)
"""Page, mark and file."""


def document(kind: type[msgspec.Struct]) -> str:
    """Tables of every key of a configuration file."""
    top = [f for f in msgspec.structs.fields(kind) if _struct_of(f.type) is None]
    parts = [_table("top level", "", top)] if top else []
    for field in msgspec.structs.fields(kind):
        inner = _struct_of(field.type)
        if inner is not None:
            parts.append(_section(field.encode_name, field.type, inner))
    return "\n\n".join(parts)


def main() -> int:
    """Rewrite the generated parts of the pages."""
    for page, name, kind in GENERATED:
        text = (DOCS / page).read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        (DOCS / page).write_text(f"{head}{begin}{document(kind)}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
    return 0


def _section(name: str, kind: Any, inner: type[msgspec.Struct]) -> str:
    title = f"[[{name}]]" if _is_list(kind) else f"[{name}]"
    fields = [f for f in msgspec.structs.fields(inner) if _struct_of(f.type) is None]
    parts = [_table(title, inner.__doc__ or "", fields)]
    for field in msgspec.structs.fields(inner):
        deeper = _struct_of(field.type)
        if deeper is not None:
            parts.append(_section(f"{name}.{field.encode_name}", field.type, deeper))
    return "\n\n".join(parts)


def _table(title: str, text: str, fields: list[Any]) -> str:
    rows = [f"| `{f.encode_name}` | {_type(f.type)} | {_default(f)} |" for f in fields]
    about = f"{' '.join(text.split())}\n\n" if text else ""
    return f"#### `{title}`\n\n{about}| key | value | default |\n|---|---|---|\n" + "\n".join(rows)


def _default(field: Any) -> str:
    if field.required:
        return "required"
    if condition := _condition(field.type):
        return condition
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in (None, (), "") else f"`{value}`"


def _condition(kind: Any) -> str:
    """When a field that has a default is required: the description of its type."""
    metas = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((str(meta.description) for meta in metas if meta.description), "")


def _type(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)
        bounds = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        limits = [f"{sign} {getattr(meta, name):g}" for name, sign in bounds.items() if getattr(meta, name) is not None]
        return f"{_type(base)} {' and '.join(limits)}".strip()
    if get_origin(kind) is Literal:
        return ", ".join(f"`{v}`" for v in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_type(a) for a in get_args(kind) if a is not NoneType)
    if get_origin(kind) is tuple:
        return f"list of {_type(get_args(kind)[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false", date: "date"}.get(kind, str(kind))


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    inner = get_args(kind)[0] if _is_list(kind) else kind
    return inner if isinstance(inner, type) and issubclass(inner, msgspec.Struct) else None


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


if __name__ == "__main__":
    sys.exit(main())
