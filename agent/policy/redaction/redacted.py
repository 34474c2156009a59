"""The one type that may leave: `agent.egress` sends nothing else, and only this package makes it."""

from collections.abc import Mapping
from typing import Literal

from agent.policy.outgoing import Outgoing

_SEAL = object()


class Redacted:
    """A request for exactly one provider. ``category`` outside: its findings are replaced by placeholders. ``category``
    premises: it is as the client sent it, because it does not leave. ``counts`` are the replaced findings by kind;
    ``originals`` the text behind each placeholder, for this one answer. Never in a log: its ``repr`` shows no text."""

    __slots__ = ("category", "counts", "originals", "outgoing", "provider")

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
        self.provider, self.category, self.outgoing = provider, category, outgoing
        self.counts, self.originals = counts, originals

    def __repr__(self) -> str:
        return f"<Redacted for {self.provider} ({self.category}), {sum(self.counts.values())} findings>"
