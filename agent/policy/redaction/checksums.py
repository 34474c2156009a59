"""Check digits of identifiers, from their public definitions. Pure."""

import re
from itertools import accumulate

_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27"
        "GB22GE22GI23GL18GR27GT28HN28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22"
        "MK19MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28"
        "TL23TN24TR26UA29VA22VG24XK20YE30",
    )
}
"""Characters of an account number by country: the registry of ISO 13616."""


class Luhn:
    """The Luhn sums of every part of a digit string, so that each part costs the same."""

    def __init__(self, digits: str) -> None:
        values = [int(one) for one in digits]
        # the last digit of a part counts once, the one before it twice, and so on, whatever its position
        self._even, self._odd = (
            [0, *accumulate(_DOUBLED[one] if (n + odd) % 2 else one for n, one in enumerate(values))] for odd in (0, 1)
        )

    def holds(self, start: int, end: int) -> bool:
        """Whether ``digits[start:end]`` ends with its check digit."""
        sums = self._even if (end - 1) % 2 == 0 else self._odd
        return (sums[end] - sums[start]) % 10 == 0


def iban(text: str) -> bool:
    """Whether letters and digits are an IBAN: its country's length, and ISO 7064 mod 97-10."""
    if IBAN_LENGTHS.get(text[:2]) != len(text) or not text.isascii() or not text.isalnum():
        return False
    return int("".join(str(int(one, 36)) for one in text[4:] + text[:4])) % 97 == 1


def steuer_id(digits: str) -> bool:
    """German tax number for persons: 11 digits, one of the first ten twice or three times, ISO 7064 mod 11,10."""
    counts = sorted(digits[:10].count(one) for one in set(digits[:10]))
    if digits[0] == "0" or counts not in ([1] * 8 + [2], [1] * 7 + [3]):
        return False
    product = 10
    for one in digits[:10]:
        product = ((int(one) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def rentenversicherung(text: str) -> bool:
    """German social insurance number: area, birthday, letter, serial number, check digit."""
    numbers = f"{text[:8]}{ord(text[8]) - 64:02}{text[9:11]}"
    day, month = int(text[2:4]), int(text[4:6])
    weighted = (int(one) * int(weight) for one, weight in zip(numbers, "212571212121", strict=True))
    return 1 <= day % 50 <= 31 and 1 <= month <= 12 and sum(n // 10 + n % 10 for n in weighted) % 10 == int(text[11])


def personalausweis(text: str) -> bool:
    """German identity card or passport: nine letters and digits and their check digit, by ICAO 9303."""
    return sum(int(one, 36) * (7, 3, 1)[n % 3] for n, one in enumerate(text[:9])) % 10 == int(text[9])


def ssn(digits: str) -> bool:
    """United States social security number: none of the ranges that are never given."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def itin(digits: str) -> bool:
    """United States tax number for persons without a social security number."""
    group = int(digits[3:5])
    return digits[0] == "9" and (50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99)


def nir(text: str) -> bool:
    """French social security number with its key; Corsica's departments are 2A and 2B."""
    number = text[:13].replace("2A", "19").replace("2B", "18") if text[5:7] in ("2A", "2B") else text[:13]
    month = int(text[3:5])
    plausible = 1 <= month <= 12 or 20 <= month <= 42 or 50 <= month <= 99
    return number.isdigit() and plausible and 97 - int(number) % 97 == int(text[13:15])
