"""What removing the service takes, and what stays. Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent.operator.service import launchd
from agent.operator.service.plan import DSCL, FIREWALL, NEWSYSLOG
from agent.operator.service.steps import Command, Step, command

LAST_ROLE = 499
"""The greatest number of an account without a login."""
_ABSENT = (56,)
"""dscl's status for a record that is not there."""


class Place(NamedTuple):
    """A folder of the service: ``ours`` are names in it that the agent made and that go, ``asked`` those that go when
    they are asked for, ``other`` the rest."""

    path: str
    ours: Sequence[str] = ()
    asked: Sequence[str] = ()
    other: Sequence[str] = ()


class Found(NamedTuple):
    """What is there: ``stop_s`` is what the property list allows for a stop; ``uid`` is None where the user is none of
    this machine's; ``rules`` are programs with a rule of the firewall; ``models_elsewhere`` is a folder of models
    outside of the state folder."""

    loaded: bool = False
    stop_s: float = 0.0
    files: Sequence[str] = ()
    user: str = ""
    uid: int | None = None
    rules: Sequence[str] = ()
    places: Sequence[Place] = ()
    models_elsewhere: str = ""
    config: str = ""


def files() -> tuple[str, ...]:
    """What an installation may have put into the system's folders."""
    return launchd.PLIST, launchd.NEW_PLIST, NEWSYSLOG


def removable_user(found: Found) -> bool:
    """Whether the user is one that `install` makes: a person's account is never removed."""
    return found.uid is not None and found.user.startswith("_") and found.uid <= LAST_ROLE


def removal(found: Found, *, user: bool, models: bool) -> list[Step]:
    """The steps, in their order: what runs first."""
    steps: list[Step] = launchd.stop(found.stop_s) if found.loaded else []
    steps += [command("/bin/rm", "-f", path) for path in found.files]
    steps += [Command((FIREWALL, "--remove", program), optional=True) for program in found.rules]
    for place in found.places:
        gone = [*place.ours, *(place.asked if models else ())]
        steps += [command("/bin/rm", "-rf", f"{place.path}/{name}") for name in gone]
        if not place.other and (models or not place.asked):
            steps.append(Command(("/bin/rmdir", place.path), optional=True))
    if user and removable_user(found):
        steps += [
            Command((DSCL, ".", "-delete", f"/{kind}/{found.user}"), fine=_ABSENT) for kind in ("Users", "Groups")
        ]
    return steps


def stays(found: Found, *, user: bool, models: bool) -> Iterator[str]:
    """What is not removed, each as a sentence."""
    for place in found.places:
        kept = [] if models else list(place.asked)
        if kept:
            yield f"{place.path} keeps {', '.join(kept)}; --models removes them"
        if place.other:
            yield f"{place.path} keeps what the agent did not make: {', '.join(place.other)}"
    if found.models_elsewhere:
        yield f"{found.models_elsewhere}, the folder of models, may be used by others; remove it yourself"
    if found.uid is not None and removable_user(found) and not user:
        yield f"user {found.user}; --user removes it"
    elif found.uid is not None and not removable_user(found):
        yield f"user {found.user}, which `install` did not make"
    if found.config:
        yield f"{found.config}, and the secrets and certificates that it names"
