"""Numbers that a state gives a person, by country. Pure.

A country is added by ``register``: the form of the number, and a function that checks its digits.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from agent.policy.redaction import checksums

S = r"[\s\-./_]{0,3}"
"""What may stand between two characters of a number."""
_CONTEXT_CHARS = 60


class NationalId(NamedTuple):
    """``form`` is a regular expression whose match is bounded, its separators included; ``holds`` gets the letters and
    digits of a match, in capitals. With ``near``, one of these words must stand within 60 characters before it: for
    numbers whose form says too little."""

    form: str
    holds: Callable[[str], bool]
    near: str = ""


COUNTRIES: dict[str, tuple[NationalId, ...]] = {}


def register(country: str, *ids: NationalId) -> None:
    """Add numbers of a country, an ISO 3166 code as in ``redaction.regions``."""
    COUNTRIES[country] = (*COUNTRIES.get(country, ()), *ids)


def spaced(*parts: str) -> str:
    """Parts with separators between them."""
    return S.join(parts)


def digits(count: int) -> str:
    """Digits with separators between them."""
    return rf"\d(?:{S}\d){{{count - 1}}}"


_GAP = r"(?:[\-./_\xa0 ]\s{0,2}|\s{1,3})"
"""A separator that must be there."""
_PERSO = "[CFGHJKLMNPRTVWXYZ0-9]"

register(
    "DE",
    NationalId(digits(11), checksums.steuer_id),
    NationalId(spaced(digits(8), "[A-Za-z]", digits(3)), checksums.rentenversicherung),
    NationalId(spaced("[CFGHJKLMNPRTVWXY]", *[_PERSO] * 8, r"\d(?=D?\b|<)"), checksums.personalausweis),
    NationalId(
        spaced("[CFGHJKLMNPRTVWXY]", *[_PERSO] * 8),
        lambda text: any(one.isdigit() for one in text),
        near="ausweis|reisepass|passport|identity card|id card|passnummer",
    ),
)
register(
    "US",
    NationalId(rf"\d{{3}}{_GAP}\d\d{_GAP}\d{{4}}", lambda text: checksums.ssn(text) or checksums.itin(text)),
    NationalId(
        digits(9),
        lambda text: checksums.ssn(text) or checksums.itin(text),
        near=r"ssn|itin|social security|taxpayer|tax id",
    ),
)
register("FR", NationalId(spaced("[1-478]", digits(4), r"\d", r"[\dABab]", digits(8)), checksums.nir))


class NationalIds:
    """Finds the numbers of some countries."""

    def __init__(self, countries: Iterable[str]) -> None:
        self._known = [
            (re.compile(rf"(?<![A-Za-z0-9])(?=({one.form})(?![A-Za-z0-9]))"), one, re.compile(one.near, re.IGNORECASE))
            for country in countries
            for one in COUNTRIES.get(country, ())
        ]

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, the number in its plain form) of each."""
        for form, one, near in self._known:
            if one.near and near.search(text) is None:
                continue
            for match in form.finditer(text):
                plain = "".join(filter(str.isalnum, match.group(1))).upper()
                before = text[max(0, match.start() - _CONTEXT_CHARS) : match.start()]
                if one.holds(plain) and (not one.near or near.search(before)):
                    yield match.start(1), match.end(1), plain
