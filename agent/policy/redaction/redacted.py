"""The one type that may leave: `agent.egress` sends nothing else, and only this package makes it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NoReturn

from agent.policy.outgoing import Outgoing

_SEAL = object()
"""Known to this package alone; `make arch` finds its name anywhere else (scripts/house.py)."""


class Redacted:
    """A request for exactly one provider. ``category`` outside: its findings are replaced by placeholders. ``category``
    premises: it is as the client sent it, because it does not leave. ``counts`` are the replaced findings by kind;
    ``originals`` the text behind each placeholder, for this one answer. Never in a log: its ``repr`` shows no text.

    It cannot be made without the seal, changed, subclassed, copied or pickled."""

    __slots__ = ("category", "counts", "originals", "outgoing", "provider")
    category: Literal["premises", "outside"]
    counts: Mapping[str, int]
    originals: Mapping[str, str]
    outgoing: Outgoing
    provider: str

    def __init__(
        self,
        seal: object,
        *,
        provider: str,
        category: Literal["premises", "outside"],
        outgoing: Outgoing,
        counts: Mapping[str, int],
        originals: Mapping[str, str],
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("Redacted: only agent.policy.redaction makes one")
        for name, value in (
            *(("provider", provider), ("category", category), ("outgoing", outgoing)),
            *(("counts", MappingProxyType(dict(counts))), ("originals", MappingProxyType(dict(originals)))),
        ):
            object.__setattr__(self, name, value)

    def __init_subclass__(cls) -> None:
        raise TypeError("Redacted: has no subclasses")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("Redacted: is not changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("Redacted: is not changed")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("Redacted: is neither copied nor stored")

    def __repr__(self) -> str:
        return f"<Redacted for {self.provider} ({self.category}), {sum(self.counts.values())} findings>"
