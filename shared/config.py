"""Read TOML into a typed, frozen structure and report all problems at once.

A program describes its configuration as nested msgspec Structs. Unlike a plain conversion, which stops at the first
error, this collects all errors with their key paths, so that the operator edits the file once.
"""

import difflib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

from shared.errors import Halt

T = TypeVar("T", bound=msgspec.Struct)


class ConfigError(Halt):
    """Invalid configuration; ``problems`` lists every error."""

    code = "bad_config"

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


def load(path: Path, kind: type[T], check: Callable[[T], Sequence[str]]) -> T:
    """Read ``path`` as ``kind``. ``check`` validates what types cannot. Raises ConfigError with all problems."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; pass the path with --config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    return parse(text, kind, check, source=str(path))


def parse(text: str, kind: type[T], check: Callable[[T], Sequence[str]], *, source: str) -> T:
    """Like load, for text that is already read."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, [f"invalid TOML: {error}"]) from None
    found = list(problems(tree, kind, ""))
    if found:
        raise ConfigError(source, found)
    config = msgspec.convert(tree, kind)
    found = list(check(config))
    if found:
        raise ConfigError(source, found)
    return config


def problems(tree: Any, kind: Any, path: str) -> list[str]:
    """All mismatches between ``tree`` and ``kind``, each as ``key.path: what is wrong``."""
    struct = _struct_of(kind)
    if struct is not None:
        return _struct_problems(tree, struct, path)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (list, tuple) and isinstance(tree, list) and args and _struct_of(args[0]) is not None:
        return [p for n, item in enumerate(tree) for p in problems(item, args[0], f"{path}[{n}]")]
    try:
        msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        return [f"{path}: {_plain(str(error))}"]
    return []


def _struct_problems(tree: Any, kind: type[msgspec.Struct], path: str) -> list[str]:
    if not isinstance(tree, dict):
        return [f"{path or 'file'}: expected a table"]
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    found = []
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(fields))}"
            found.append(f"{_join(path, key)}: unknown key{hint}")
    for name, field in fields.items():
        if name in tree:
            found += problems(tree[name], field.type, _join(path, name))
        elif field.required:
            found.append(f"{_join(path, name)}: is required")
    return found


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    """The Struct in ``Struct`` or ``Struct | None``; None for anything else."""
    if get_origin(kind) in (Union, UnionType):
        inner = [a for a in get_args(kind) if a is not type(None)]
        kind = inner[0] if len(inner) == 1 else None
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _plain(message: str) -> str:
    """msgspec's message without its `$` paths, which are relative to the value and not to the file."""
    return message.split(" - at ")[0].replace("`", "").lower()
