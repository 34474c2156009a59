"""Which class a request has, and what named it. Pure."""

from collections.abc import Callable

import msgspec

from agent.policy.classes import CLASSES, FIELD, HEADER, Declared, TaskClass, both, of_model
from agent.policy.facts import ClassFrom
from agent.policy.rules import Rules, of_key
from agent.policy.rules import of_model as policy_of


class Stated(msgspec.Struct, frozen=True, kw_only=True):
    """The class of a request and what named it; ``sensitive``: its caller said so (the reason ``label``)."""

    task_class: TaskClass
    class_from: ClassFrom
    sensitive: bool = False


def class_of(
    header: Declared, body: Declared, model: str, key_id: str, rules: Rules, guessed: Callable[[], TaskClass]
) -> Stated:
    """The class that the header names, or else the body, the model's name (``class:routine``), the policy for the
    model, that for the key, or at last the heuristic, which is not asked before. Raises Refused where the caller's own
    declarations contradict each other, or name no class."""
    said = both(both(header, body, HEADER), Declared(of_model(model)), FIELD)
    named: tuple[tuple[TaskClass | None, ClassFrom], ...] = (
        (header.task_class, "header"),
        (body.task_class, "body"),
        (said.task_class, "model"),
        (policy_of(rules, model).task_class, "model"),
        (of_key(rules, key_id).task_class, "key"),
    )
    for task_class, class_from in named:
        if task_class is not None:
            return Stated(task_class=task_class, class_from=class_from, sensitive=said.sensitive)
    usable = of_key(rules, key_id).classes
    return Stated(task_class=_nearest(guessed(), usable), class_from="guess", sensitive=said.sensitive)


def _nearest(guess: TaskClass, usable: tuple[TaskClass, ...]) -> TaskClass:
    """A guess refuses nobody: of the classes that a key may use the highest up to the guess, else the lowest above."""
    below = [one for one in CLASSES[: CLASSES.index(guess) + 1] if one in usable]
    above = [one for one in CLASSES if one in usable]
    return below[-1] if below else above[0] if above else guess
