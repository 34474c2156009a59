"""The interface of sensors, and their readings. Pure; ``source`` reads files and commands."""

import json
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from shared.records import HostSample

MAX_OUTPUT_BYTES = 1 << 20
"""The largest output that is accepted from a source."""
MOST_RPM = 20_000
MOST_W = 1_000.0
"""No fan turns faster, and no node draws more; a higher number is an error of its source."""
MOST_OVER_SYSTEM = 1.1
"""The parts draw no more than the whole system, with 10 % tolerance."""
_NOTHING = HostSample()

T = TypeVar("T")


class Reading(NamedTuple):
    """A sample with only the fields that were read, and each failed source with its reason."""

    sample: HostSample
    failed: dict[str, str]

    @property
    def fields(self) -> dict[str, Any]:
        """What was read, by name."""
        names = HostSample.__struct_fields__
        return {name: value for name in names if (value := getattr(self.sample, name)) != getattr(_NOTHING, name)}


def merged(*samples: HostSample) -> HostSample:
    """Several samples as one; later ones win."""
    fields = (Reading(sample, {}).fields for sample in samples)
    return HostSample(**{name: value for one in fields for name, value in one.items()})


def checked(reading: Reading) -> Reading:
    """The reading, validated. Raises TypeError or msgspec.ValidationError when it is not a sample or a field has a
    wrong type: one such value would make the whole batch unreadable."""
    if not isinstance(reading.sample, HostSample):
        raise TypeError(type(reading.sample).__name__)
    return Reading(msgspec.convert(msgspec.to_builtins(reading.sample), HostSample), reading.failed)


class Source(NamedTuple):
    """One way to read something, for display. ``reason`` says why it is not used, "" when it is."""

    name: str
    reason: str
    seen: str = ""


class Collector(Protocol):
    """One thing to read. No method raises when a source fails; all may block for a few seconds."""

    name: str

    def poll(self) -> None:
        """Measure what changes from second to second; called every few seconds."""

    def read(self) -> Reading:
        """What was measured since the last call, and now. ``sample`` holds only what was actually read."""

    def sources(self) -> list[Source]:
        """Every source in the order of preference, for `doctor`; reads each of them now."""


class Failure(Exception):
    """A source cannot be read; the message says why."""


def known(found: T | None, why: str) -> T:
    """What was found. Raises Failure with ``why`` when that is None."""
    if found is None:
        raise Failure(why)
    return found


def number(value: object, below: float) -> float | None:
    """A number of a source's JSON or property list, from 0 up to ``below``; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < below else None


def json_object(raw: bytes) -> dict[str, Any]:
    """A source's JSON object; an empty one for anything else."""
    try:
        found = json.loads(text_of(raw))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def text_of(raw: bytes) -> str:
    """A source's output as text. "" if it is too long, holds a NUL or is not UTF-8: no source of ours prints that."""
    if len(raw) > MAX_OUTPUT_BYTES or b"\0" in raw:
        return ""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""
