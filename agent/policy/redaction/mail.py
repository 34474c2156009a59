"""E-mail addresses: internationalised, with quoted local parts, with an address for a domain. Pure."""

import re
from collections.abc import Iterator

_AT = re.compile(r"@|\s?[\[({<]\s?at\s?[\])}>]\s?", re.IGNORECASE)
_LOCAL_CHARS = frozenset("!#$%&'*+/=?^`{|}~-_.")
_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_DOMAIN = re.compile(
    rf"(?:{_LABEL}(?:\.|\s?[\[({{]\s?dot\s?[\])}}]\s?)){{1,8}}(?:xn--[a-z0-9-]{{1,59}}|[^\W\d_]{{2,24}})"
    r"|\[(?:IPv6:)?[0-9a-f.:]{7,45}\]",
    re.IGNORECASE,
)
_MOST_LOCAL, _MOST_DOMAIN = 66, 255


def addresses(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, address) of each. Every step is bounded, so a million of ``@`` costs a million short looks."""
    for at in _AT.finditer(text):
        domain = _DOMAIN.match(text, at.end(), at.end() + _MOST_DOMAIN)
        start = _local_start(text, at.start()) if domain else None
        if start is not None and domain is not None:
            yield start, domain.end(), text[start : domain.end()].casefold()


def _local_start(text: str, end: int) -> int | None:
    """Where the local part before a position begins; None where there is none."""
    least = max(0, end - _MOST_LOCAL)
    if text[end - 1 : end] == '"':
        opened = text.rfind('"', least, end - 1)
        return opened if 0 <= opened < end - 2 else None
    start = end
    while start > least and (text[start - 1].isalnum() or text[start - 1] in _LOCAL_CHARS):
        start -= 1
    # what ends with one of these is a label before the address, as in to=jane@example.com; not so in a VERP address
    cut = max(text.rfind(one, start, end) for one in "=/|`{")
    if cut >= 0 and "+" not in text[start:cut]:
        start = cut + 1
    while start < end and not (text[start].isalnum() or text[start] in "_+-"):
        start += 1
    return start if start < end else None
