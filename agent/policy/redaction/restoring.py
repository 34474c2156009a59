"""The answer of a provider as the client gets it: placeholders become what they stand for. Pure."""

import json

import regex
from msgspec.structs import replace

from agent.policy.outgoing import Called, Piece
from agent.policy.redaction.redacted import Redacted


class Restorer:
    """Restores one answer. It holds back only what may be the begin of a placeholder, so every split of the stream
    gives the same text. Placeholders count in any case, with their underscores escaped, as in Markdown, or not."""

    def __init__(self, redacted: Redacted) -> None:
        self._originals = {name.upper(): text for name, text in redacted.originals.items()}
        self._known = _pattern(list(redacted.originals))
        self._text = self._reasoning = ""

    def piece(self, piece: Piece) -> Piece:
        """What of an answer can be told after its next piece."""
        if self._known is None:
            return piece
        text, self._text = self._restored(self._text + piece.text)
        reasoning, self._reasoning = self._restored(self._reasoning + piece.reasoning)
        return Piece(text=text, reasoning=reasoning, calls=tuple(map(self._call, piece.calls)))

    def end(self) -> Piece:
        """What was held back, when no more follows."""
        held = Piece(text=self._text, reasoning=self._reasoning)
        self._text = self._reasoning = ""
        return held

    def _call(self, call: Called) -> Called:
        return replace(
            call,
            id="".join(self._restored(call.id)),
            name="".join(self._restored(call.name)),
            arguments="".join(self._restored(call.arguments, in_json=True)),
        )

    def _restored(self, text: str, *, in_json: bool = False) -> tuple[str, str]:
        """(restored, held back)."""
        parts, at = list[str](), 0
        while self._known is not None and (match := self._known.search(text, at, partial=True)) is not None:
            parts.append(text[at : match.start()])
            if match.partial:
                return "".join(parts), text[match.start() :]
            original = self._originals.get(match.group().replace("\\", "").upper(), match.group())
            parts.append(json.dumps(original, ensure_ascii=False)[1:-1] if in_json else original)
            at = match.end()
        return "".join([*parts, text[at:]]), ""


def _pattern(names: list[str]) -> "regex.Pattern[str] | None":
    """What finds the placeholders of one request: they differ in their kind and their number only."""
    if not names:
        return None
    labels = "|".join(sorted({name.split("_")[0] for name in names}))
    _, random, number = names[0].split("_")
    return regex.compile(
        rf"(?:{labels})\\{{0,2}}_{random}\\{{0,2}}_\d{{{len(number)}}}", regex.IGNORECASE | regex.ASCII
    )
