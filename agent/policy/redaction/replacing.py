"""From a request and what was found in it to what may leave: the only maker of Redacted. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from agent.policy.outgoing import Outgoing
from agent.policy.redaction.detectors import Detectors, Found
from agent.policy.redaction.redacted import _SEAL, Redacted
from agent.policy.redaction.strings import texts_of, walked
from agent.policy.rules import Provider
from shared.errors import Refused, Retryable

LABELS = {
    "card": "CARD",
    "iban": "IBAN",
    "national_id": "ID",
    "email": "EMAIL",
    "phone": "PHONE",
    "secret": "SECRET",
    "pattern": "TEXT",
    "name": "NAME",
}
"""What a placeholder begins with, by kind."""
NONCE_LETTERS = "bcdfghjkmnpqrtvwxz"
"""Of these the random part of a placeholder is made: no word of any language."""
_NONCE_CHARS = 6


def redact(outgoing: Outgoing, target: Provider, detectors: Detectors, *, nonce: str) -> Redacted:
    """What may leave for a provider. ``nonce`` are at least 24 random letters of NONCE_LETTERS, new for each request.
    Raises Refused with code ``not_redactable`` for what cannot be read, Retryable when an analysis fails."""
    return replaced(outgoing, target, detectors.find(*texts_of(outgoing)[:2]), nonce=nonce)


def replaced(outgoing: Outgoing, target: Provider, found: Sequence[Found], *, nonce: str) -> Redacted:
    """The same from findings that another process made of ``texts_of(outgoing)``."""
    texts, _, prose = texts_of(outgoing)
    _check(found, texts)
    random = _unused(nonce, texts)
    width = len(str(len(found)))
    first: dict[int, str] = {}
    names: dict[tuple[str, str], str] = {}
    pieces: list[list[tuple[int, int, str]]] = [[] for _ in texts]
    for one in found:
        # in prose a value has one name however it is written; a function's name must come back as it was
        written = texts[one.text][one.start : one.end]
        said = first.setdefault(one.value, written) if one.text in prose else written
        name = names.setdefault((one.kind, said), f"{LABELS[one.kind]}_{random}_{len(names) + 1:0{width}}")
        pieces[one.text].append((one.start, one.end, name))
    new = map(_with, texts, pieces)
    return Redacted(
        _SEAL,
        provider=target.name,
        category=target.category,
        outgoing=walked(outgoing, lambda text, place: next(new)),
        counts=Counter(one.kind for one in found),
        originals={name: written for (_, written), name in names.items()},
    )


def on_premises(outgoing: Outgoing, target: Provider) -> Redacted:
    """A request for a server on the premises: as it is, because it does not leave. Raises Refused for any other."""
    if target.category != "premises":
        raise Refused(f"provider {target.name}: is outside; what it gets must be redacted", code="not_redactable")
    return Redacted(_SEAL, provider=target.name, category="premises", outgoing=outgoing, counts={}, originals={})


def _check(found: Iterable[Found], texts: Sequence[str]) -> None:
    """Findings come from another process: every one must lie in its text, after the one before."""
    at = (0, 0)
    for one in found:
        known = one.kind in LABELS and 0 <= one.text < len(texts)
        if not known or not at <= (one.text, one.start) or not one.start < one.end <= len(texts[one.text]):
            raise Retryable("redaction: the analysis gave findings that do not fit", code="analysis_failed")
        at = (one.text, one.end)


def _unused(nonce: str, texts: Sequence[str]) -> str:
    """Random letters that no text of the request holds in any case, so that no text of a client is a placeholder."""
    said = [text.casefold() for text in texts]
    for random in _slices(nonce):
        if not any(random in text for text in said):
            return random
    raise Retryable("redaction: no placeholder is free", code="analysis_failed")


def _slices(nonce: str) -> Iterator[str]:
    yield from (nonce[n : n + _NONCE_CHARS] for n in range(0, len(nonce) - _NONCE_CHARS + 1, _NONCE_CHARS))


def _with(text: str, pieces: Sequence[tuple[int, int, str]]) -> str:
    parts, at = list[str](), 0
    for start, end, placeholder in pieces:
        parts += (text[at:start], placeholder)
        at = end
    return "".join([*parts, text[at:]])
