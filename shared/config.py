"""Read TOML into a typed, frozen structure and report all problems at once.

A program describes its configuration as nested msgspec Structs. Unlike a plain conversion, which stops at the first
error, this collects all errors with their key paths, so that the operator edits the file once.
"""

import difflib
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from shared.errors import Halt
from shared.regular_file import read_file

MOST_BYTES = 4 << 20
SETTLE_S, SETTLE_TRIES = 0.1, 20
T = TypeVar("T", bound=msgspec.Struct)
_NOTHING = object()


FOLDER = Path("/usr/local/etc/mlxrack")
"""Where a machine's configuration lies, for both programs; the current folder's counts before it."""


class ConfigError(Halt):
    """Invalid configuration; ``problems`` lists every error."""

    code = "bad_config"

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


def located(name: str, given: Path | None, named: str | None) -> Path | None:
    """The file ``name`` of a program: the one on the command line, the one in its environment variable, whether they
    exist or not; else the first that exists in the current folder and in ``FOLDER``. None when there is none."""
    if given is not None or named:
        return given or Path(str(named))
    return next((path for path in (Path(name), FOLDER / name) if path.exists()), None)


def places(name: str, variable: str) -> str:
    """Where ``located`` looks, for --help."""
    return f"${variable}, ./{name}, {FOLDER / name}; the first that is there"


def load(path: Path, kind: type[T], check: Callable[[T], Sequence[str]]) -> T:
    """Read ``path`` as ``kind``. ``check`` validates what types cannot. Raises ConfigError with all problems."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        also = f", nor {FOLDER / path}" if path == Path(path.name) else ""
        raise ConfigError(str(path), [f"no such file{also}; pass the path with --config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    return parse(text, kind, check, source=str(path))


def load_settled(path: Path, kind: type[T], check: Callable[[T], Sequence[str]]) -> T:
    """Like load, of a regular file that may be being written at this moment: half of a file may be a valid one. Blocks
    for ``SETTLE_S`` and more."""
    for _ in range(SETTLE_TRIES):
        before = _stamp(path)
        try:
            text = read_file(path, MOST_BYTES).decode()
        except FileNotFoundError:
            text, before = "", None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(str(path), [f"cannot be read: {getattr(error, 'strerror', '') or error}"]) from None
        time.sleep(SETTLE_S)
        if before is not None and before == _stamp(path):
            return parse(text, kind, check, source=str(path))
    raise ConfigError(str(path), ["is being written, or gone; try again when it is complete"])


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None while there is none."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size, seen.st_ino


def parse(text: str, kind: type[T], check: Callable[[T], Sequence[str]], *, source: str) -> T:
    """Like load, for text that is already read."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, [f"invalid TOML: {error}"]) from None
    found = _Found()
    readable = _readable(tree, kind, "", found)
    try:
        config = msgspec.convert(readable, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(source, found.problems or [_plain(str(error))]) from None
    values = [problem for problem in check(config) if not found.covers(problem)]
    if found.problems or values:
        raise ConfigError(source, [*found.problems, *values])
    return config


class _Found:
    """Problems of types, and the paths of what could not be read, about whose values nothing is said."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._unread: list[str] = []

    def add(self, path: str, what: str, unread: str | None = None) -> None:
        """Note a problem; ``unread`` is what it makes unreadable, if not ``path`` alone."""
        self.problems.append(f"{path or 'file'}: {what}")
        self._unread.append(unread or path)

    def covers(self, problem: str) -> bool:
        """Whether a problem of a value, which begins with the key's path, follows from what could not be read."""
        path = problem.split(" ")[0].rstrip(":")
        return any(path == unread or path.startswith((f"{unread}.", f"{unread}[")) for unread in self._unread)


def _readable(tree: Any, kind: Any, path: str, found: _Found) -> Any:
    """``tree`` without what does not fit ``kind``, all of which is noted; _NOTHING when it does not fit at all."""
    struct, items = _struct_of(kind), _items_of(kind)
    if struct is not None:
        return _readable_table(tree, struct, path, found)
    if items is not None and isinstance(tree, list):
        read = [_readable(item, items, f"{path}[{n}]", found) for n, item in enumerate(tree)]
        return [item for item in read if item is not _NOTHING]
    try:
        msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        # what a table's other keys have to be depends on its kind
        chosen = path.rpartition(".")[0] if get_origin(kind) is Literal else None
        found.add(path, _plain(str(error)), chosen)
        return _NOTHING
    return tree


def _readable_table(tree: Any, kind: type[msgspec.Struct], path: str, found: _Found) -> Any:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    if not isinstance(tree, dict):
        found.add(path, "expected a table")
        return _stand_in(kind, path)
    for key in (key for key in tree if key not in fields):
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(fields))}"
        found.add(_join(path, key), f"unknown key{hint}")
    read = {}
    for name, field in fields.items():
        at = _join(path, name)
        value = _readable(tree[name], field.type, at, found) if name in tree else _NOTHING
        if name not in tree and field.required:
            found.add(at, "is required")
        if value is not _NOTHING:
            read[name] = value
        elif field.required:
            read[name] = _stand_in(field.type, at)
    return read


def _stand_in(kind: Any, path: str) -> Any:
    """A value in place of a required one that cannot be read, so that the others can be checked. A text is the path:
    no other is the same."""
    if (struct := _struct_of(kind)) is not None:
        return _readable_table({}, struct, path, _Found())
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return [] if _items_of(kind) is not None else path if kind is str else 1


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    """The Struct in ``Struct`` or ``Struct | None``; None for anything else."""
    if get_origin(kind) in (Union, UnionType):
        inner = [a for a in get_args(kind) if a is not type(None)]
        kind = inner[0] if len(inner) == 1 else None
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def _items_of(kind: Any) -> Any:
    """The type of a list's items; None for anything else."""
    if get_origin(kind) is Annotated:  # a list whose description says when it is required
        kind = get_args(kind)[0]
    return get_args(kind)[0] if get_origin(kind) in (list, tuple) else None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _plain(message: str) -> str:
    """msgspec's message without its `$` paths, which are relative to the value and not to the file."""
    return message.split(" - at ")[0].replace("`", "").lower()
