"""Card numbers and IBANs, however they are grouped. Pure."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from agent.policy.redaction.checksums import IBAN_LENGTHS, Luhn, iban

_RUN = re.compile(r"\d(?:[\s\-./_,:|*]{0,3}\d)+")
_BRANDS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720)\d+|3[47]\d{13}|(?:30[0-5]|36|3[89])\d+|"
    r"(?:35|6|50|5[6-8]|8[12]|220[0-4]|0604|1800|2131)\d+"
)
_HEAD = re.compile("[3-6]|2[1-7]|8[12]|0604|1800")
_MOST_DIGITS, _LEAST_DIGITS = 19, 12
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])(?:IBAN)?(?=([A-Za-z])[\s\-./_]{0,3}([A-Za-z])[\s\-./_]{0,3}\d[\s\-./_]{0,3}\d)", re.IGNORECASE
)
_NEXT = re.compile(r"[\s\-./_]{0,3}([A-Za-z0-9])")
_EDGE = re.compile(r"[A-Za-z]{0,8}")
_TAIL = re.compile(r"[A-Za-z]*\Z")


def cards(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, digits) of each card number: 12 to 19 digits that end with their check digit, as a brand has them.
    Groups are those of cards, or even; two groups of any size count where something other than a space parts them."""
    for run in _RUN.finditer(text):
        if sum(map(str.isdigit, run.group())) < _LEAST_DIGITS:
            continue
        at = [n for n in range(run.start(), run.end()) if text[n].isdigit()]
        digits = "".join(text[n] for n in at)
        sums = Luhn(digits)
        begins = [0, *(n for n in range(1, len(at)) if at[n] - at[n - 1] > 1), len(at)]
        for first, begin in enumerate(begins[:-1]):
            if not _HEAD.match(digits, begin):
                continue
            least = bisect_left(begins, begin + _LEAST_DIGITS, first + 1)
            for last in range(least, bisect_right(begins, begin + _MOST_DIGITS, least)):
                if not sums.holds(begin, begins[last]):
                    continue
                start, end = at[begin], at[begins[last] - 1] + 1
                sizes = [b - a for a, b in zip(begins[first:last], begins[first + 1 : last + 1], strict=True)]
                number = digits[begin : begins[last]]
                if _branded(number) and _grouped(sizes, text[start:end]) and _stands_alone(text, start, end):
                    yield start, end, number


def _branded(number: str) -> bool:
    if len(set(number)) == 1 or not _BRANDS.fullmatch(number):
        return False
    if re.match("5[1-5]|22[3-9]|222[1-9]|2[3-6]|27", number):
        return len(number) == 16
    if number[0] == "3" and number[1] in "0689":
        return len(number) in (14, 16, 17, 18, 19)
    if number[:4] in ("1800", "2131"):
        return len(number) == 15
    return len(number) >= (16 if number[:2] in ("35", "22", "81", "82") else _LEAST_DIGITS)


def _grouped(sizes: list[int], written: str) -> bool:
    if len(sizes) == 1 or sizes in ([4, 6, 5], [4, 6, 4], [6, 13]):
        return True
    if len(sizes) == 2:
        return min(sizes) >= 2 and not re.search(r"\d \d", written)
    even = len(set(sizes[:-1])) == 1 and sizes[-1] <= sizes[0] + (sizes[0] > 2)
    even = even or all(one % 4 == 0 for one in sizes[:-1])
    return even and len(set(re.sub(r"[\d\n\r]", "", written).replace("\xa0", " "))) <= 2


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Not part of a longer number or word: a word may touch it where it is not a hexadecimal number."""
    before = _TAIL.search(text, max(0, start - 8), start)
    after = _EDGE.match(text, end)
    words = (before.group() if before else "", after.group() if after else "")
    outside = (text[start - 1 : start], text[end : end + 1])
    if any(one.isdigit() for one in outside) or re.search(r"\d[.,]\Z", text[max(0, start - 2) : start]):
        return False
    return all(not word or re.search("[g-zG-Z]", word) for word in words)


def ibans(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, IBAN in its plain form) of each."""
    for match in _IBAN.finditer(text):
        start, length = match.start(1), IBAN_LENGTHS.get(f"{match[1]}{match[2]}".upper(), 0)
        found, at = list[str](), start
        while len(found) < length and (following := _NEXT.match(text, at)):
            found.append(following[1])
            at = following.end()
        plain = "".join(found).upper()
        glued = text[at : at + 1].isdigit() or (text[at : at + 1].isalpha() and not plain[-1:].isdigit())
        if length and iban(plain) and not glued:
            yield start, at, plain
