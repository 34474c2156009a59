"""Values to find and texts to find nothing in, for scripts/bench_redaction.py and the tests: two generators that share
no code with the detectors, of which one is Faker and mimesis, the other made from the public definitions."""

import ast
import base64
import json
import random
import string
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import phonenumbers
from faker import Faker
from mimesis import Locale, Person
from mimesis.providers import Payment

LETTERS = string.ascii_letters + string.digits
Make = Callable[[], str]


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def _some(rng: random.Random, count: int, alphabet: str = LETTERS) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def _fitting(base: str, holds: Callable[[str], bool]) -> str:
    """The base with the one last digit that fits."""
    return next(base + one for one in string.digits if holds(base + one))


def _luhn(number: str) -> bool:
    total = 0
    for n, one in enumerate(reversed(number)):
        value = int(one) * (1 + n % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def own_card(rng: random.Random) -> str:
    """A card of any brand, grouped in any of the usual ways."""
    prefix, length = rng.choice(
        [
            *(("4", n) for n in (13, 16, 19)),
            *((str(rng.randint(51, 55)), 16), (str(rng.randint(2221, 2720)), 16)),
            *(("34", 15), ("37", 15), ("6011", 16), ("65", 16), (str(rng.randint(644, 649)), 16)),
            *((str(rng.randint(300, 305)), 14), ("36", 14), ("38", 14)),
            *((str(rng.randint(3528, 3589)), 16), ("1800", 15), ("2131", 15)),
            *((rng.choice(("5018", "5020", "5038", "6304", "6759", "6761", "6763")), rng.randint(12, 19)), ("62", 16)),
        ]
    )
    number = _fitting(prefix + _digits(rng, length - 1 - len(prefix)), _luhn)
    size = rng.choice((0, 0, 4, 4))
    mark = rng.choice((" ", "-", "."))
    return mark.join(number[n : n + size] for n in range(0, length, size)) if size else number


def own_iban(rng: random.Random) -> str:
    """An IBAN of a country, in one piece or in groups of four."""
    country, length, letters = rng.choice(
        [
            *(("DE", 22, 0), ("FR", 27, 0), ("GB", 22, 4), ("NL", 18, 4), ("AT", 20, 0), ("ES", 24, 0), ("IT", 27, 1)),
            *(("MT", 31, 4), ("CH", 21, 0), ("PL", 28, 0), ("NO", 15, 0), ("SE", 24, 0), ("BE", 16, 0), ("PT", 25, 0)),
        ]
    )
    bban = _some(rng, letters, string.ascii_uppercase) + _digits(rng, length - 4 - letters)
    number = "".join(str(int(one, 36)) for one in bban + country)
    iban = f"{country}{98 - int(number) * 100 % 97:02}{bban}"
    return " ".join(iban[n : n + 4] for n in range(0, length, 4)) if rng.random() < 0.5 else iban


def own_steuer_id(rng: random.Random) -> str:
    """A German tax number: one digit of the first ten occurs twice, another not at all."""
    while True:
        digits = rng.sample(string.digits, 9)
        digits.insert(rng.randrange(10), rng.choice(digits))
        if digits[0] != "0":
            break
    state = 10
    for one in digits:
        total = (int(one) + state) % 10
        state = (total if total else 10) * 2 % 11
    number = "".join(digits) + str((11 - state) % 10 if state != 1 else 0)
    return number if rng.random() < 0.6 else f"{number[:2]} {number[2:5]} {number[5:8]} {number[8:]}"


def own_rvnr(rng: random.Random) -> str:
    """A German social insurance number."""
    letter = rng.choice(string.ascii_uppercase)
    head = f"{rng.randint(2, 89):02}{rng.randint(1, 28):02}{rng.randint(1, 12):02}{rng.randint(0, 99):02}"
    serial = f"{rng.randint(0, 99):02}"
    total = 0
    for one, weight in zip(
        head + f"{string.ascii_uppercase.index(letter) + 1:02}" + serial, "212571212121", strict=True
    ):
        total += sum(map(int, str(int(one) * int(weight))))
    number = f"{head}{letter}{serial}{total % 10}"
    return number if rng.random() < 0.6 else f"{head[:2]} {head[2:]} {letter} {serial}{total % 10}"


def own_perso(rng: random.Random) -> str:
    """A German identity card number with its check digit."""
    serial = rng.choice("LMNPRTVWXY") + _some(rng, 8, "CFGHJKLMNPRTVWXYZ0123456789")
    values = string.digits + string.ascii_uppercase
    return serial + str(sum(values.index(one) * (7, 3, 1)[n % 3] for n, one in enumerate(serial)) % 10)


def own_ssn(rng: random.Random) -> str:
    """A United States social security number, or a tax number for persons without one."""
    if rng.random() < 0.3:
        group = rng.choice([*range(50, 66), *range(70, 89), 90, 91, 92, *range(94, 100)])
        return f"9{_digits(rng, 2)}-{group}-{_digits(rng, 4)}"
    area = rng.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03}{(mark := rng.choice(('-', ' ', '-')))}{rng.randint(1, 99):02}{mark}{rng.randint(1, 9999):04}"


def own_nir(rng: random.Random) -> str:
    """A French social security number with its key, Corsica included."""
    place = rng.choice(("2A", "2B", *(f"{n:02}" for n in range(1, 96) if n != 20)))
    born = f"{rng.choice('12')}{rng.randint(0, 99):02}{rng.randint(1, 12):02}"
    number = f"{born}{place}{rng.randint(1, 990):03}{rng.randint(1, 999):03}"
    digits = int(number.replace("A", "0").replace("B", "0"))
    digits -= {"2A": 1_000_000, "2B": 2_000_000}.get(place, 0)
    key = f"{97 - digits % 97:02}"
    groups = (number[0], number[1:3], number[3:5], place, number[7:10], number[10:], key)
    return ("" if rng.random() < 0.5 else " ").join(groups)


def own_email(rng: random.Random) -> str:
    """An address, some with tags, dots, long or internationalised domains."""
    local = _some(rng, rng.randint(1, 12), string.ascii_lowercase + string.digits)
    local += rng.choice(("", f".{_some(rng, 5)}", f"+{_some(rng, 4)}", f"_{_digits(rng, 2)}"))
    host = rng.choice((_some(rng, 8, string.ascii_lowercase), "mail.example", "münchen", "xn--mnchen-3ya", "a-b"))
    return f"{local}@{host}.{rng.choice(('com', 'de', 'co.uk', 'museum', 'photography', 'fr', 'рф'))}"


def key_forms(rng: random.Random) -> dict[str, Make]:
    """Keys as their issuers document them."""
    hexa, capital = "0123456789abcdef", string.ascii_uppercase + "234567"
    word = LETTERS + "_-"
    return {
        "openai": lambda: f"sk-proj-{_some(rng, 74, word)}T3BlbkFJ{_some(rng, 74, word)}",
        "openai-old": lambda: f"sk-{_some(rng, 20)}T3BlbkFJ{_some(rng, 20)}",
        "anthropic": lambda: f"sk-ant-api03-{_some(rng, 93, word)}AA",
        "openrouter": lambda: f"sk-or-v1-{_some(rng, 64, hexa)}",
        "github": lambda: f"gh{rng.choice('pousr')}_{_some(rng, 36)}",
        "github-fine": lambda: f"github_pat_{_some(rng, 22)}_{_some(rng, 59)}",
        "gitlab": lambda: f"glpat-{_some(rng, 20, word)}",
        "aws": lambda: f"{rng.choice(('AKIA', 'ASIA'))}{_some(rng, 16, capital)}",
        "google": lambda: f"AIza{_some(rng, 35, word)}",
        "slack": lambda: f"xox{rng.choice('bp')}-{_digits(rng, 12)}-{_digits(rng, 12)}-{_some(rng, 24)}",
        "stripe": lambda: f"{rng.choice(('sk', 'rk'))}_live_{_some(rng, 24)}",
        "huggingface": lambda: f"hf_{_some(rng, 34, string.ascii_letters)}",
        "sendgrid": lambda: f"SG.{_some(rng, 22, word)}.{_some(rng, 43, word)}",
        "npm": lambda: f"npm_{_some(rng, 36)}",
        "digitalocean": lambda: f"dop_v1_{_some(rng, 64, hexa)}",
        "telegram": lambda: f"{_digits(rng, 9)}:AA{_some(rng, 33, word)}",
        "databricks": lambda: f"dapi{_some(rng, 32, hexa)}",
        "jwt": lambda: f"eyJ{_some(rng, 33)}.eyJ{_some(rng, 60)}.{_some(rng, 43, word)}",
        "groq": lambda: f"gsk_{_some(rng, 52)}",
        "pem": lambda: (
            "-----BEGIN PRIVATE KEY-----\n"
            + "\n".join(_some(rng, 64, LETTERS + "+/") for _ in range(6))
            + rng.choice(("\n-----END PRIVATE KEY-----", "=="))
        ),
    }


def _one_of(rng: random.Random, *makes: Make) -> Make:
    return lambda: rng.choice(makes)()


def generators(seed: int) -> dict[str, dict[str, Make]]:
    """By generator and type, a function that makes the next value."""
    rng = random.Random(seed)
    fakers = {one: Faker(one) for one in ("de_DE", "en_US", "fr_FR")}
    for n, faker in enumerate(fakers.values()):
        faker.seed_instance(seed + n)
    english, french = fakers["en_US"], fakers["fr_FR"]
    people = [Person(one, seed=seed) for one in (Locale.DE, Locale.EN, Locale.FR)]
    payment = Payment(seed=seed)
    keys = key_forms(rng)
    return {
        "library": {
            "card": lambda: rng.choice((english.credit_card_number(), payment.credit_card_number())),
            "iban": lambda: rng.choice(list(fakers.values())).iban(),
            "id US": english.ssn,
            "id FR": french.ssn,
            "email": lambda: rng.choice((rng.choice(list(fakers.values())).email(), rng.choice(people).email())),
            **{
                f"phone {region}": _one_of(rng, faker.phone_number, person.phone_number)
                for region, faker, person in zip(("DE", "US", "FR"), fakers.values(), people, strict=True)
            },
        },
        "own": {
            "card": lambda: own_card(rng),
            "iban": lambda: own_iban(rng),
            "id DE tax": lambda: own_steuer_id(rng),
            "id DE insurance": lambda: own_rvnr(rng),
            "id DE card": lambda: own_perso(rng),
            "id US": lambda: own_ssn(rng),
            "id FR": lambda: own_nir(rng),
            "email": lambda: own_email(rng),
            "phone": lambda: own_phone(rng),
            **{f"key {name}": make for name, make in keys.items()},
        },
    }


def own_phone(rng: random.Random) -> str:
    """A number of a region's plan, in one of the forms in which its people write it."""
    region = rng.choice(("DE", "US", "FR"))
    kind = rng.choice((phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE))
    example = phonenumbers.example_number_for_type(region, kind)
    assert example is not None
    while True:
        digits = str(example.national_number)
        number = phonenumbers.PhoneNumber(
            country_code=example.country_code, national_number=int(digits[:3] + _digits(rng, len(digits) - 3))
        )
        if phonenumbers.is_valid_number_for_region(number, region):
            break
    form = rng.choice(
        (
            phonenumbers.PhoneNumberFormat.E164,
            phonenumbers.PhoneNumberFormat.INTERNATIONAL,
            phonenumbers.PhoneNumberFormat.NATIONAL,
        )
    )
    return phonenumbers.format_number(number, form)


def is_valid_phone(value: str, region: str) -> bool:
    """Whether a region's numbering plan knows a number, as phonenumbers reads it."""
    try:
        return phonenumbers.is_valid_number_for_region(phonenumbers.parse(value, region), region)
    except phonenumbers.NumberParseException:
        return False


SENTENCES = (
    *("My number is {}, please check it.", "{}", "Bitte an {} senden", "ref: {}\nthanks", '{{"value": "{}"}}'),
    *("Le numéro {} est le mien.", "({})", "x={};", "Use {} for that", "| a | {} | b |"),
)


def manuals() -> Iterator[tuple[str, str]]:
    """(name, text) of manuals on this machine: what Python's library says of itself, and licences."""
    for path in sorted(Path(sys.base_prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}").glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (one for one in ast.walk(tree) if isinstance(one, ast.Module | ast.ClassDef | ast.FunctionDef))
        yield path.name, "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    for folder in ("/usr/share/common-licenses", "/usr/share/perl/5.36.0/pod", "/usr/share/doc"):
        for path in sorted(Path(folder).rglob("*")) if Path(folder).is_dir() else ():
            plain = path.suffix in ("", ".txt", ".pod", ".md", ".rst")
            if plain and path.is_file() and path.stat().st_size < 2_000_000:
                try:
                    yield str(path), path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue


def _full_width(value: str) -> str:
    return "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in value)


def _in_script(zero: str) -> Callable[[str], str]:
    return lambda value: "".join(chr(ord(zero) + int(one)) if one in string.digits else one for one in value)


def _between(mark: str) -> Callable[[str], str]:
    return lambda value: value[: len(value) // 2] + mark + value[len(value) // 2 :]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


VARIANTS: dict[str, Callable[[str], str]] = {
    "plain": lambda value: value,
    **{
        f"a {name} inside": _between(mark)
        for name, mark in {
            "no-break space": "\u00a0",
            "thin space": "\u2009",
            "narrow space": "\u202f",
            "wide space": "\u3000",
            "line break": "\n",
            "Windows line break": "\r\n",
            "indented line break": "\n    ",
            "line separator": "\u2028",
            "tab": "\t",
            "soft hyphen": "\u00ad",
            "byte order mark": "\ufeff",
        }.items()
    },
    **{
        f"{name} between all": mark.join
        for name, mark in {
            "zero-width spaces": "\u200b",
            "zero-width joiners": "\u200d",
            "word joiners": "\u2060",
            "right-to-left marks": "\u200f",
            "combining accents": "\u0301",
            "variation selectors": "\ufe0f",
        }.items()
    },
    "right-to-left override": lambda value: f"\u202e{value}\u202c",
    "full width": _full_width,
    "Arabic digits": _in_script("\u0660"),
    "Devanagari digits": _in_script("\u0966"),
    "mathematical digits": _in_script("\U0001d7ce"),
    "keycaps": lambda value: "".join(f"{one}\ufe0f\u20e3" if one in string.digits else one for one in value),
    "JSON escapes": lambda value: "".join(f"\\u{ord(one):04x}" for one in value),
    "one JSON escape": lambda value: f"\\u{ord(value[0]):04x}{value[1:]}",
    "JSON in JSON": lambda value: json.dumps(json.dumps("".join(f"\\u{ord(one):04x}" for one in value))),
    "hexadecimal escapes": lambda value: "".join(f"\\x{one:02x}" for one in value.encode()),
    "percent": lambda value: "".join(f"%{one:02X}" for one in value.encode()),
    "percent twice": lambda value: urllib.parse.quote(urllib.parse.quote(value, safe=""), safe=""),
    "HTML, decimal": lambda value: "".join(f"&#{ord(one)};" for one in value),
    "HTML, hexadecimal": lambda value: "".join(f"&#x{ord(one):x};" for one in value),
    "quoted-printable": lambda value: "".join(f"={one:02X}" for one in value.encode()),
    "base64": lambda value: _base64(value.encode()),
    "base64, url-safe": lambda value: base64.urlsafe_b64encode(value.encode()).decode().rstrip("="),
    "base64 of UTF-16": lambda value: _base64(value.encode("utf-16-le")),
    "base64 of a sentence": lambda value: _base64(f"hello, {value} it is".encode()),
    "base64, wrapped": lambda value: base64.encodebytes(f"{'x' * 50} {value} {'y' * 50}".encode()).decode(),
    "base64 twice": lambda value: _base64(_base64(value.encode()).encode()),
    "base64 of hexadecimal": lambda value: _base64(value.encode().hex().encode()),
    "base64 of JSON escapes": lambda value: _base64("".join(f"\\u{ord(one):04x}" for one in value).encode()),
    "hexadecimal": lambda value: value.encode().hex(),
    "hexadecimal, spaced": lambda value: value.encode().hex(" ").upper(),
    "hexadecimal, colons": lambda value: value.encode().hex(":"),
    "a list of bytes": lambda value: ", ".join(f"0x{one:02x}" for one in value.encode()),
    "tag characters": lambda value: "".join(chr(0xE0000 + ord(one)) for one in value),
}
"""Ways to write a value that a person or a model still reads."""
