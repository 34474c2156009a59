"""Task classes: what a request is for, as its caller states it. Pure.

ROUTINE is extraction, classification, short drafts; REASONING is multi-step or ambiguous; ORCHESTRATION is planning and
delegation. SENSITIVE is orthogonal: it must stay on the premises, whatever the class.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from shared.errors import Refused

TaskClass = Literal["ROUTINE", "REASONING", "ORCHESTRATION"]
CLASSES: tuple[TaskClass, ...] = get_args(TaskClass)
"""From the least urgent to the most."""
SENSITIVE = "SENSITIVE"
HEADER = "X-Task-Class"
FIELD = "metadata.task_class"
_KEY = FIELD.partition(".")[2]
_SEPARATORS = re.compile(r"[\W_]")
AUTO = "auto"
"""The model name of a caller who leaves the choice to the policy."""
CLASS_PREFIX = "class:"
"""``class:routine`` as a model name states the class and leaves the model to the policy."""


class Declared(NamedTuple):
    """What a caller said. ``task_class`` is None where only SENSITIVE, or nothing, was said."""

    task_class: TaskClass | None = None
    sensitive: bool = False


NOTHING = Declared()


def declared(texts: Iterable[str], where: str) -> Declared:
    """Parse class names separated by commas, in any case: ``texts`` are the values of a header that may be repeated.
    An unknown name is refused, never ignored, and so is a value that names none: a misspelt or missing SENSITIVE would
    be taken for permission. Raises Refused naming ``where``, and never quotes what was sent."""
    values = list(texts)
    found = [name.strip().upper() for text in values for name in text.split(",") if name.strip()]
    known = {name: name for name in CLASSES}
    classes = [known[name] for name in found if name in known]
    unknown = len(found) != len(classes) + found.count(SENSITIVE)
    if unknown or len(set(classes)) > 1 or (values and not found):
        wanted = f"one of {', '.join(CLASSES)}, with or without {SENSITIVE}"
        raise Refused(f"{where}: expected {wanted}, like ROUTINE, SENSITIVE", code="invalid_value", param=where)
    return Declared(classes[0] if classes else None, SENSITIVE in found)


def in_metadata(metadata: object) -> Declared:
    """What the body's ``metadata`` declares under ``task_class``; other keys are the caller's own. A key that is almost
    that one is refused like a misspelt class. Raises Refused."""
    if not isinstance(metadata, dict):
        return NOTHING
    near = [key for key in metadata if key != _KEY and _SEPARATORS.sub("", str(key)).lower() == "taskclass"]
    if near:
        raise Refused(f"metadata: the class is declared as {_KEY}", code="invalid_value", param=FIELD)
    if (named := metadata.get(_KEY)) is None:
        return NOTHING
    if not isinstance(named, str):
        raise Refused(f"{FIELD}: expected a string, like ROUTINE, SENSITIVE", code="invalid_value", param=FIELD)
    return declared([named], FIELD)


def both(first: Declared, second: Declared, where: str) -> Declared:
    """Two declarations of one request, by header, body or model name: either makes it SENSITIVE, and two classes must
    agree. Raises Refused."""
    if first.task_class and second.task_class and first.task_class != second.task_class:
        ways = f"{HEADER}, {FIELD} and a model name like {CLASS_PREFIX}routine"
        raise Refused(f"{where}: {ways} must name the same class", code="invalid_value", param=where)
    return Declared(first.task_class or second.task_class, first.sensitive or second.sensitive)


def of_model(name: str) -> TaskClass | None:
    """The class in a model name like ``class:routine``; None for any other name. Raises Refused for an unknown one."""
    if not name.lower().startswith(CLASS_PREFIX):
        return None
    found = declared([name[len(CLASS_PREFIX) :]], "model")
    if found.task_class is None or found.sensitive:
        raise Refused(
            f"model: expected {CLASS_PREFIX} and one of {', '.join(CLASSES)}", code="invalid_value", param="model"
        )
    return found.task_class


def is_left_open(name: str) -> bool:
    """Whether a model name leaves the choice of the model to the policy."""
    return name.lower() == AUTO or name.lower().startswith(CLASS_PREFIX)


def rank_of(task_class: TaskClass, class_from: str) -> int:
    """How soon a request of this class has its turn beside others, the higher the sooner: -1 ROUTINE, 1 REASONING,
    2 ORCHESTRATION. A class that was guessed (``class_from`` of its facts) ranks 0, between ROUTINE and REASONING, so
    that where nobody declares anything all requests are equal, and a guess neither gains nor costs anything."""
    return 0 if class_from == "guess" else _RANKS[task_class]


_RANKS: dict[TaskClass, int] = {"ROUTINE": -1, "REASONING": 1, "ORCHESTRATION": 2}


def written(name: str) -> str:
    """A model name that leaves the choice open, as the policy file writes it: ``auto`` or ``class:routine``."""
    prefix, colon, rest = name.lower().partition(":")
    return f"{prefix}{colon}{rest.strip()}"
