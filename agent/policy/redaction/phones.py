"""Phone numbers that the numbering plans of configured regions know, and any that begins with + and a country's code.
Pure: the plans are in the package phonenumbers, which parses only what begins with another country's code."""

import re
from collections.abc import Iterable, Iterator

import phonenumbers
from phonenumbers import PhoneMetadata

_RUN = re.compile(
    r"(?<![\d.,])(?:\+[\s(]{0,2}|\((?=[\s\d]))?\d(?:[\s\-./_()\[\]]{0,4}\d){5,19}(?P<more>[\s\-./_()\[\]]{0,4}\d)?"
)
_NEXT = re.compile(r"(?<=\d)[^\d]{1,6}(?=\d)")
_EXTENSION = re.compile(
    r"[\s,;]{0,3}(?:x|ext\.?|extn\.?|extension|durchwahl|dw\.?|poste|#)[\s.:]{0,2}\d{1,7}(?!\d)", re.IGNORECASE
)
_NO_PHONE = re.compile(
    r"(?:0?[1-9]|[12]\d|3[01])([./-])(?:0?[1-9]|1[0-2])\1(?:19|20)\d\d.*"
    r"|(?:19|20)\d\d([./-]?)(?:0[1-9]|1[0-2])\2(?:0[1-9]|[12]\d|3[01]).*"
    r"|\d{1,3}(?:\.\d{1,3}){3}|(?:2147483|4294967)\d{3}|[01\s]+|\+?\d[.,]\d+|\+?\d+[.,]\d{1,2}|\D*(\d)\D*(?:\3\D*)+",
    re.DOTALL,
)
"""Dates, IPv4 addresses, limits of integers, binary and decimal numbers, one digit again and again."""
_POSTAL = re.compile(r"\b[A-Z]{2},?\s{1,4}\Z")
_INSIDE = re.compile(r"[A-Za-z0-9]-\Z")
_GOES_ON = re.compile(r"-\d*[A-Za-z]")
_NORTH_AMERICAN = re.compile(r"(?:\+?1[\s.-]{0,2})?\(?[2-9]\d\d[).\s/-]{1,2}[2-9]\d\d[.\s-]\d{4}")
"""Three, three and four digits are a phone number, whether or not its area is given out yet."""
_TYPES = ("fixed_line", "mobile", "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "pager", "uan")
_LEAST_DIGITS, _MOST_DIGITS, _MOST_GROUPS = 7, 16, 7


class _Plan:
    """The numbering plan of one region."""

    def __init__(self, plan: PhoneMetadata) -> None:
        self.code = str(plan.country_code)
        forms = [getattr(plan, kind).national_number_pattern for kind in _TYPES if getattr(plan, kind) is not None]
        self._valid = re.compile("|".join(f"(?:{one})" for one in forms if one))
        self._trunk = re.compile(plan.national_prefix_for_parsing or "(?!)")
        self._needs_trunk = plan.national_prefix == "0"

    def within(self, digits: str) -> str | None:
        """A number as it is dialled in the region, in E.164 form."""
        trunk = self._trunk.match(digits)
        forms = [digits[trunk.end() :]] if trunk else []
        forms += [] if self._needs_trunk else [digits]
        return next((f"+{self.code}{one}" for one in forms if self._valid.fullmatch(one)), None)

    def abroad(self, digits: str) -> str | None:
        """A number after the country's code, with a needless (0) or without."""
        return f"+{self.code}{digits}" if self._valid.fullmatch(digits) else self.within(digits)


class Phones:
    """Finds the numbers of some regions. The plans are read at once, so that later no file is."""

    def __init__(self, regions: Iterable[str]) -> None:
        PhoneMetadata.load_all()
        plans = map(PhoneMetadata.metadata_for_region, regions)
        self._plans = [_Plan(one) for one in plans if one is not None]

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, number in E.164 form) of each, an extension included."""
        at = 0
        while (run := _RUN.search(text, at)) is not None:
            found = self._number(text, run)
            if found is not None:
                yield found
                at = found[1]
            else:
                following = _NEXT.search(text, run.start(), run.end())
                at = following.end() if following else run.end()

    def _number(self, text: str, run: re.Match[str]) -> tuple[int, int, str] | None:
        """The number that a run begins with: up to a line's end, else the longest."""
        start, end = run.start(), run.start("more") if run["more"] else run.end()
        gaps = list(_NEXT.finditer(text, start, end))
        ends = [one.start() for one in gaps][: _MOST_GROUPS - 1] if len(gaps) < _MOST_GROUPS or run["more"] else []
        if not run["more"] or len(gaps) < _MOST_GROUPS:
            ends.append(end)
        if not ends or sum(map(str.isdigit, text[start : ends[-1]])) < _LEAST_DIGITS:
            return None
        lines = [one.start() for one in gaps if "\n" in one.group() and one.start() in ends]
        for stop in (*lines, *reversed(ends)):
            written = text[start:stop]
            digits = "".join(filter(str.isdigit, written))
            if _LEAST_DIGITS <= len(digits) <= _MOST_DIGITS and _apart(text, start, stop):
                number = None if _NO_PHONE.fullmatch(written) else self._valid(written, digits)
                if number is not None:
                    extension = _EXTENSION.match(text, stop)
                    return start, extension.end() if extension else stop, number
        return None

    def _valid(self, written: str, digits: str) -> str | None:
        plus = written.lstrip("(").startswith("+")
        if plus or digits.startswith("00"):
            dialled = digits if plus else digits[2:]
            of_plans = [one.abroad(dialled[len(one.code) :]) for one in self._plans if dialled.startswith(one.code)]
            return next(filter(None, of_plans), None) or _of_any_country(dialled)
        known = next(filter(None, [one.within(digits) for one in self._plans]), None)
        if known is None and any(one.code == "1" for one in self._plans) and _NORTH_AMERICAN.fullmatch(written):
            return f"+1{digits[-10:]}"
        return known


def _of_any_country(digits: str) -> str | None:
    try:
        number = phonenumbers.parse(f"+{digits}")
    except phonenumbers.NumberParseException:
        return None
    return f"+{digits}" if phonenumbers.is_valid_number(number) else None


def _apart(text: str, start: int, end: int) -> bool:
    """Whether it is not a part of a word, an identifier, a sum of money or a decimal number."""
    before, after = text[max(0, start - 8) : start], text[end : end + 2]
    if before[-1:].isalnum() or (before and before[-1] in "$€£") or (after[1:].isdigit() and after[0] in ".,"):
        return False
    if _INSIDE.search(before) or _GOES_ON.match(text, end):
        return False
    if re.fullmatch(r"\d{5}-\d{4}", text[start:end]) and _POSTAL.search(before):
        return False
    return not after[:1].isalnum() or _EXTENSION.match(text, end) is not None
