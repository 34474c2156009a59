"""What is found in texts: every kind by two generators, in every spelling, and next to nothing in manuals. The full
figures are those of `make bench-redaction`."""

import random
import re
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.redaction import checksums
from agent.policy.redaction import detectors as module
from agent.policy.redaction.detectors import Detectors, Found, found_in
from agent.policy.redaction.national_ids import COUNTRIES, NationalId, digits, register
from agent.policy.redaction.views import View, closed_up, edited, fold_character, folded, readings
from agent.policy.rules import Redaction, Rules, Sensitive
from scripts.redaction_corpus import SENTENCES, VARIANTS, generators, is_valid_phone, manuals
from shared.errors import Retryable

TYPES = [(who, name) for who, types in generators(1).items() for name in types]
KINDS = {"card": "card", "iban": "iban", "id": "national_id", "email": "email", "phone": "phone", "key": "secret"}
CARD = "4111 1111 1111 1111"


@cache
def detectors() -> Detectors:
    return Detectors(Rules())


def said(texts: Sequence[str], found: Sequence[Found]) -> list[tuple[str, str]]:
    return [(one.kind, texts[one.text][one.start : one.end]) for one in found]


def missed(text: str, value: str) -> str:
    """The letters and digits of a value in a text that no finding covers."""
    at = text.index(value)
    covered = {n for one in detectors().find([text]) for n in range(one.start, one.end)}
    return "".join(text[n] for n in range(at, at + len(value)) if n not in covered and text[n].isalnum())


@pytest.mark.parametrize(("who", "name"), TYPES, ids=str)
def test_generated_values_are_found_whatever_stands_around_them(who: str, name: str) -> None:
    make, rng = generators(23)[who][name], random.Random(4)
    values = [make() for _ in range(40)]
    if name.startswith("phone "):
        values = [one for one in values if is_valid_phone(one.split("x")[0], name.removeprefix("phone "))]
    assert len(values) > 5
    for value in values:
        text = rng.choice(SENTENCES).format(value)
        assert missed(text, value) == "", text
        kinds = {kind for kind, _ in said([text], detectors().find([text]))}
        assert KINDS[name.split()[0]] in kinds or (name == "id US" and "phone" in kinds)  # 030-12-3456 may be either


ASCII_TYPES = ("card", "iban", "id DE tax", "id DE insurance", "id DE card", "id US", "id FR", "phone")
WORDS = ("key github", "key aws", "key jwt")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*ASCII_TYPES, *WORDS])
def test_a_value_survives_in_every_spelling(name: str, variant: str) -> None:
    make = generators(31)["own"][name]
    for _ in range(4):
        value = VARIANTS[variant](make())
        if variant == "base64 of UTF-16" and not value.isascii():
            continue
        assert missed(f"My value is {value} , thanks", value) == "", value


@pytest.mark.parametrize(
    "variant", [one for one in VARIANTS if " break" not in one and one not in ("tab", "line separator")]
)
def test_an_address_survives_in_every_spelling(variant: str) -> None:
    for address in ("jane.doe+list@example.com", "o_hara7@mail.example.co.uk"):
        value = VARIANTS[variant](address)
        assert missed(f"My address: {value} , thanks", value) == "", value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"Jane Doe"@example.com', '"Jane Doe"@example.com'),
        ("post@münchen.example", "post@münchen.example"),
        ("用户@例え.jp", "用户@例え.jp"),
        ("bounce+jane=example.org@lists.example.com", "bounce+jane=example.org@lists.example.com"),
        ("to=jane@example.com&cc=x", "jane@example.com"),
        ("<mailto:jane@example.com>", "jane@example.com"),
        ("ops@[192.0.2.7]", "ops@[192.0.2.7]"),
        ("jane (at) example (dot) com", "jane (at) example (dot) com"),
        ("jane@exam\nple.com", "jane@exam\nple.com"),
        ("jane.\ndoe@example.com", "jane.\ndoe@example.com"),
        ("jane\u00a0doe@example.com", "jane\u00a0doe@example.com"),
        ("Regards, Jane\njane@example.com\nBerlin", "jane@example.com"),
    ],
)
def test_addresses(text: str, found: str) -> None:
    assert said([text], detectors().find([text])) == [("email", found)]


@pytest.mark.parametrize(
    "text",
    [
        *("@dataclass", "user@host", "a@b", "@", "x @ y.z", "git@", "3.141592653589793", "2147483648", "0.333333333"),
        *("2026-11-27 10:21:33", "192.168.100.200", "ISBN 978-3-16-148410-0", "00010203-0405-0607-0809-0a0b0c0d0e0f"),
        *(
            "4111 1111 1111 1112",
            "GB81 WEST 1234 5698 7654 32",
            "000-12-3456",
            "666-12-3456",
            "123-00-4567",
            "123-45-0000",
        ),
        *(
            "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
            "sha256: 4111111111111111" + "ab" * 24,
            "Boston, MA 02110-1301, USA",
        ),
        *("sk-learn", "ghp_short", "key = value", "password: changeme", "postgres://localhost/db", "a" * 200),
        *("the quick brown fox jumps over the lazy dog", "base64 alphabet ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghij"),
    ],
)
def test_what_only_looks_like_a_finding_is_none(text: str) -> None:
    assert said([text], detectors().find([text])) == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "sk-abcdefghijklmnopqrstuvwx",
            "AKIAIOSFODNN7EXAMPLE",
            "ghp_" + "1234567890" * 3 + "abcdef",
            "xoxb-1234567890-abc",
        ),
        *(
            "https://ops:s3cr3t-Pa55@db.example.com/x",
            "redis://:Hunter2Hunter2@cache:6379",
            "acme_live_" + "aB3dE6gH9j2" * 3,
        ),
        *(
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY1",
            '"api_key": "9f8e7d6c5b4a39281706f5e4d3c2b1a0"',
        ),
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gt",
        "MIICdgIBADANBgkqhkiG9w0BAQEFAASCAmAwggJcAgEAAoGBAL" + "aB3/" * 20,
    ],
)
def test_keys_are_found_by_their_form_even_where_they_look_like_examples(text: str) -> None:
    assert {kind for kind, _ in said([text], detectors().find([text]))} == {"secret"}


def test_a_private_key_without_a_last_line_ends_where_its_lines_end() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join("MIIEpAIBAAKCAQEA7Xw3" + "aB3dE6gH" * 5 for _ in range(3))
    text = f"{key}\nWhat is wrong with this file?"
    assert said([text], detectors().find([text])) == [("secret", key)]


def test_next_to_nothing_is_found_in_manuals() -> None:
    size, found = 0, list[tuple[str, str]]()
    for _, text in manuals():
        size += len(text)
        found += (one for one in said([text], detectors().find([text])) if one[0] != "email")
        if size > 300_000:
            break
    assert size > 300_000
    assert len(found) <= size / 100_000
    assert [one for one in found if one[0] == "secret"] == []


@pytest.mark.parametrize("at", range(4, 15))
def test_a_value_divided_between_two_texts_is_replaced_in_both(at: int) -> None:
    value = CARD.replace(" ", "")
    texts = [f"my card is {value[:at]}", f"{value[at:]} and thanks"]
    found = said(texts, detectors().find(texts, [(0, 1)]))
    assert found == [("card", value[:at]), ("card", value[at:])]
    assert detectors().find(texts) == ()


def test_a_label_before_the_second_part_does_not_hide_it() -> None:
    texts = ["the first half: 4111 1111", "the rest: 1111 1111"]
    assert said(texts, detectors().find(texts, [(0, 1)])) == [("card", "4111 1111"), ("card", "1111 1111")]


def test_a_word_after_a_text_that_ends_with_an_address_is_not_taken_for_a_part() -> None:
    texts = ["write to jane@example.com", "Thanks"]
    assert said(texts, detectors().find(texts, [(0, 1)])) == [("email", "jane@example.com")]


def test_a_value_has_one_number_however_and_wherever_it_is_written() -> None:
    texts = [f"{CARD} 4111-1111-1111-1111", "abc4111111111111111def", "jane@example.com JANE@example.com"]
    found = detectors().find(texts)
    assert [one.value for one in found if one.kind == "card"] == [0, 0]
    texts = ["ssn 078051120", "it is 078051120 there, too"]
    assert said(texts, detectors().find(texts)) == [("national_id", "078051120")] * 2


def test_many_values_are_looked_for_in_a_time_that_does_not_grow_with_them() -> None:
    texts = ["ssn 078051120 and jane@example.com", "again 078051120; jane@example.com"]
    once = said(texts, detectors().find(texts))
    few, module._FEW = module._FEW, 0
    try:
        assert said(texts, detectors().find(texts)) == once
    finally:
        module._FEW = few


def test_patterns_of_the_policy_are_found_and_may_not_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Detectors(Rules(redaction=Redaction(patterns=(r"PRJ-\d{4}",)))).find(["see PRJ-\uff11234", "no PRJ"])
    assert [(one.kind, one.text) for one in found] == [("pattern", 0)]
    monkeypatch.setattr("agent.policy.redaction.detectors.PATTERN_S", 0.05)
    slow = Detectors(Rules(redaction=Redaction(patterns=(r"(?:a|a)+\d\d$",))))
    with pytest.raises(Retryable) as raised:
        slow.find(["a" * 60 + "!"])
    assert raised.value.code == "analysis_failed"


def test_regions_decide_whose_numbers_are_known_and_a_country_can_be_added() -> None:
    text = "86095742719 and 030 1234567"
    assert len(detectors().find([text])) == 2
    assert Detectors(Rules(redaction=Redaction(regions=("US",)))).find([text]) == ()

    def bsn(number: str) -> bool:
        return sum(int(a) * b for a, b in zip(number, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=True)) % 11 == 0

    register("NL", NationalId(digits(9), bsn))
    try:
        found = Detectors(Rules(redaction=Redaction(regions=("NL",)))).find(["bsn 111222333, not 111222334"])
        assert said(["bsn 111222333, not 111222334"], found) == [("national_id", "111222333")]
    finally:
        del COUNTRIES["NL"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Projekt GEHEIM, intern", ("words[0]",)),
        ("die Geheimnisse", ()),
        ("STRASSE der Macht", ("words[1]",)),
        ("straße\u200b der\nmacht", ("words[1]",)),
        ("R2VoZWltIGlzdCBkYXM=", ("words[0]",)),
        ("ge\\u0068eim", ("words[0]",)),
        ("K-1234", ("patterns[0]",)),
        (f"pay {CARD}", ("card",)),
        ("jane@example.com", ()),
    ],
)
def test_what_makes_a_text_sensitive(text: str, names: tuple[str, ...]) -> None:
    sought = Sensitive(kinds=("card",), words=("geheim", "Straße der Macht"), patterns=(r"K-\d{4}",))
    assert found_in([text, ""], Detectors(Rules(sensitive=sought))) == names


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (checksums.iban, "GB82WEST12345698765432"),
        (checksums.steuer_id, "86095742719"),
        (checksums.rentenversicherung, "65170839J003"),
        (checksums.personalausweis, "T220001293"),
        (checksums.nir, "255081416802538"),
    ],
)
def test_check_digits_by_published_examples(check: Callable[[str], bool], good: str) -> None:
    assert [number for last in "0123456789" if check(number := good[:-1] + last)] == [good]


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_positions_lead_back_to_the_original(text: str) -> None:
    for view in (*readings(text), *(closed_up(one) for one in readings(text))):
        for n in range(len(view.text)):
            start, end = view.span(n, n + 1)
            assert 0 <= start < end <= len(text)


@given(st.text(alphabet="4 1\u200b\u00a0\uff11\\u0034@.a-\n", max_size=60))
@settings(max_examples=150, deadline=None)
def test_findings_are_in_order_disjoint_and_within_their_texts(text: str) -> None:
    texts, at = [text, text[::-1]], (0, 0)
    for one in detectors().find(texts, [(0, 1)]):
        assert at <= (one.text, one.start)
        assert one.start < one.end <= len(texts[one.text])
        at = (one.text, one.end)


def test_a_view_of_a_view_keeps_unchanged_text_unchanged() -> None:
    assert folded(View("plain ASCII")).below is None
    assert fold_character("é") == "e"
    view = edited(View("a-b-c"), re.compile("-"), lambda _: "")
    assert (view.text, view.span(1, 3)) == ("abc", (2, 5))
