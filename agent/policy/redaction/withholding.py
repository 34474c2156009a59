"""What of an answer a client does not get: secrets, and what an operator's patterns match. Pure.

Secrets are found by the forms of keys.py. A stream is held back from where something of the kind may begin, for at most
HELD_CHARS; a match that is longer is not found, except private keys, which are withheld to their last line.
"""

from collections.abc import Sequence

import regex
from msgspec.structs import replace

from agent.policy.outgoing import Called, Piece
from agent.policy.redaction import keys
from agent.policy.rules import Content
from shared.errors import Retryable

MARKER = "[withheld]"
HELD_CHARS = 2_000
_PRIVATE_KEY_CHARS = 20_000
_TIME_OUT_S = 0.5


class Withholder:
    """Filters one answer. ``withheld`` is how often something was replaced by MARKER; from then on the answer's finish
    is ``content_filter``, so that no client runs a tool call or trusts a text that is not whole."""

    def __init__(self, content: Content) -> None:
        sought = [*((keys.STANDING_ALONE,) if content.secrets else ()), *content.patterns]
        self._sought = [regex.compile(one) for one in sought]
        self._text, self._reasoning = _Channel(self._sought, content), _Channel(self._sought, content)
        self._content = content
        self._in_calls = 0

    @property
    def withheld(self) -> int:
        """How many parts were withheld so far."""
        return self._text.withheld + self._reasoning.withheld + self._in_calls

    def piece(self, piece: Piece) -> Piece:
        """What the client gets after the next piece. Raises Retryable when a pattern takes too long."""
        if not self._sought:
            return piece
        text, reasoning = self._text.add(piece.text), self._reasoning.add(piece.reasoning)
        return Piece(text=text, reasoning=reasoning, calls=tuple(map(self._call, piece.calls)))

    def end(self) -> Piece:
        """What was held back, when no more follows."""
        return Piece(text=self._text.end(), reasoning=self._reasoning.end())

    def finish(self, finish: str) -> str:
        """The finish that the client is told."""
        return "content_filter" if self.withheld else finish

    def _call(self, call: Called) -> Called:
        whole = [_Channel(self._sought, self._content) for _ in range(2)]
        name, arguments = (
            one.add(text) + one.end() for one, text in zip(whole, (call.name, call.arguments), strict=True)
        )
        self._in_calls += sum(one.withheld for one in whole)
        return replace(call, name=name, arguments=arguments)


class _Channel:
    """One text of an answer."""

    def __init__(self, sought: Sequence["regex.Pattern[str]"], content: Content) -> None:
        self._sought, self._secrets = sought, content.secrets
        self._held, self._before = "", ""
        self._dropping: int | None = None
        self.withheld = 0

    def add(self, text: str) -> str:
        """What of the text so far can be told."""
        self._held += text
        return self._told(last=False)

    def end(self) -> str:
        """The rest."""
        return self._told(last=True)

    def _told(self, *, last: bool) -> str:
        parts = list[str]()
        while self._held:
            if self._dropping is not None and not self._drop(last=last):
                break
            start, end = self._next(last=last)
            parts.append(self._take(start))
            if end == start:
                break
            self._take(end - start)
            parts.append(MARKER)
            self.withheld += 1
        return "".join(parts)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._before = (self._before + taken)[-1:]
        return taken

    def _next(self, *, last: bool) -> tuple[int, int]:
        """The next part to withhold; an empty one where what may be one begins, or at the end."""
        text, least = self._before + self._held, len(self._before)
        found = (len(text), len(text))
        for one in self._sought:
            match = _search(one, text, least, partial=not last)
            if match is None or match.start() >= found[0]:
                continue
            whole = not match.partial and (last or match.end() < len(text))
            found = (match.start(), match.end() if whole else match.start())
        if found[0] == found[1] and len(text) - found[0] > HELD_CHARS:
            # too long for anything that is sought, or the most of it that is
            wholes = [match for one in self._sought if (match := _search(one, text, least, partial=False))]
            first = min(wholes, key=lambda match: match.start(), default=None)
            found = first.span() if first else (len(text) - HELD_CHARS // 2,) * 2
        if self._secrets and (key := _search(_BEGIN, text, least, partial=not last)) and key.start() <= found[0]:
            if key.partial:
                return key.start() - least, key.start() - least
            self._dropping = _PRIVATE_KEY_CHARS
            return key.start() - least, key.end() - least
        return found[0] - least, found[1] - least

    def _drop(self, *, last: bool) -> bool:
        """Leave out a private key's lines; whether its end is reached."""
        end = _END.search(self._held)
        left = self._dropping or 0
        if end is not None and (last or end.end() < len(self._held) or end.group().endswith("-----")):
            self._take(end.end())
        elif last or len(self._held) > left:
            self._take(len(self._held) if last else left)
        else:
            keep = min(len(self._held), 80)  # the last line may be divided
            self._dropping = left - (len(self._held) - keep)
            self._take(len(self._held) - keep)
            return False
        self._dropping = None
        return True


_BEGIN, _END = regex.compile(keys.BEGIN), regex.compile(keys.END)


def _search(pattern: "regex.Pattern[str]", text: str, at: int, *, partial: bool) -> "regex.Match[str] | None":
    try:
        return pattern.search(text, at, partial=partial, timeout=_TIME_OUT_S)
    except TimeoutError:
        raise Retryable("the content filter took too long; see content.patterns", code="analysis_failed") from None
