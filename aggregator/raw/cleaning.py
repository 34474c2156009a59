"""Names and texts of batches as they may enter the tables. Pure.

Nothing is dropped, because a batch with a strange text has true numbers: a name that breaks the rules of names is
replaced by one that keeps to them (the same one for the same name), in a text each character that cannot be printed by
a blank. What a node of this rack configures is within the rules, and is left as it is.
"""

import hashlib
import re
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from shared.batch import Batch
from shared.records import Hardware

NAMES = frozenset(
    ("model", "for_model", "version", "from_version", "to_version", "worker", "peer", "key_id", "task_class", "swap_id")
) | {"place"}
"""Fields that name something of the rack; checked as `shared.keys.check_name` does, "" is allowed."""
LABELS = frozenset(("meter", "nodes", "outcome", "finish", "place_category", "state", "level", "kind"))
"""Short texts, of any printable characters."""
MOST_NAME, MOST_LABEL, MOST_TEXT = 63, 100, 500
_NAME = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,62})?")
_NOT_NAME = re.compile(r"[^A-Za-z0-9._-]")


def cleaned(batch: Batch) -> Batch:
    """A batch without strange names and texts; the batch itself if it has none."""
    records = tuple(map(_cleaned, batch.records))
    if any(new is not old for new, old in zip(records, batch.records, strict=True)):
        batch = msgspec.structs.replace(batch, records=records)
    return _cleaned(batch)


def name(given: str) -> str:
    """A valid name for a given one, distinct for distinct ones."""
    if _NAME.fullmatch(given):
        return given
    mark = hashlib.sha256(given.encode(errors="replace")).hexdigest()[:6]
    return f"x{_NOT_NAME.sub('_', given)[: MOST_NAME - 8]}-{mark}"


def text(given: str, most: int = MOST_TEXT) -> str:
    """A text of printable characters, cut to a length."""
    if len(given) <= most and given.isprintable():
        return given
    cut = given if len(given) <= most else given[: most - 1] + "…"
    return "".join(one if one.isprintable() else " " for one in cut)


S = TypeVar("S", bound=msgspec.Struct)


@lru_cache
def _texts(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Fields that may hold text."""
    fields = [f for f in msgspec.structs.fields(kind) if f.name not in ("records", "rack", "node")]
    return tuple(f.name for f in fields if "str" in str(f.type))


def _cleaned(item: S) -> S:
    changed = {}
    for field in _texts(type(item)):
        value = getattr(item, field)
        # the model of a machine ("Mac16,11") is Apple's word, no name of the rack
        apples = field == "model" and isinstance(item, Hardware)
        if value and (new := text(value, MOST_NAME) if apples else _value(field, value)) != value:
            changed[field] = new
    return msgspec.structs.replace(item, **changed) if changed else item


def _value(field: str, value: Any) -> Any:
    if isinstance(value, str):
        return name(value) if field in NAMES else text(value, MOST_LABEL if field in LABELS else MOST_TEXT)
    if isinstance(value, tuple):
        return tuple(_value(field, one) for one in value)
    return {text(key, MOST_LABEL): _value(field, one) for key, one in value.items()}
