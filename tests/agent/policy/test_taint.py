"""Marks of messages: which edits and which forms of one conversation are one, and which are not."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mesh.signing import taint_key
from agent.policy.taint import (
    BUCKETS,
    MARK_BYTES,
    RECORD_BYTES,
    Marks,
    forms,
    mark,
    marks_of,
    messages_of,
    name_of,
    normal,
    read_records,
    record,
    said,
    split,
)
from agent.wire.frames import Embed, Generate, Message, ToolCall

KEY = taint_key("a rack secret of the tests, long enough")
TEXT = "Frau Müller, Befund vom 3. Mai:\nHbA1c 7,9 % – bitte nicht weitergeben!"


def turn(role: str, content: str = "", reasoning: str = "", arguments: str | None = None) -> Message:
    calls = () if arguments is None else (ToolCall(id="c", name="f", arguments=arguments),)
    return Message(role=role, content=content, reasoning=reasoning, calls=calls)


def shares(before: list[Message], after: list[Message]) -> bool:
    """Whether a conversation is found that was marked before."""
    marked = Marks(marks_of([KEY], forms(before)))
    return any(one in marked for one in marks_of([KEY], forms(after)))


EDITS = {
    "case": TEXT.upper(),
    "spaces": f"  {TEXT.replace(' ', '   ')}\t\n",
    "no-break spaces": TEXT.replace(" ", "\u00a0"),
    "thin spaces": TEXT.replace(" ", "\u2009"),
    "another line break": TEXT.replace("\n", "\r\n"),
    "no spaces": TEXT.replace(" ", ""),
    "zero width": "\u200b".join(TEXT),
    "joiners": "\u2060".join(TEXT),
    "soft hyphens": "\u00ad".join(TEXT),
    "byte order mark": f"\ufeff{TEXT}",
    "direction marks": f"\u202e{TEXT}\u202c",
    "tags": f"{TEXT}\U000e0041\U000e007f",
    "fillers": f"{TEXT}\u3164\u115f\uffa0",
    "variation selectors": TEXT.replace("e", "e\ufe0f"),
    "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEXT),
    "mathematical": "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in TEXT),
    "decomposed": unicodedata.normalize("NFD", TEXT),
    "without accents": TEXT.replace("ü", "u"),
    "punctuation": TEXT.replace("!", "?!?").replace(",", ";"),
    "Markdown": f"> **{TEXT}**",
    "code": f"```\n{TEXT}\n```",
    "quoted": f"„{TEXT}“",
    "controls": "\x00".join(TEXT),
}


@pytest.mark.parametrize("edited", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_trivial_edits_do_not_escape_in_any_role(edited: str, role: str) -> None:
    assert shares([turn("user", TEXT)], [turn(role, edited)])
    assert shares([turn(role, edited)], [turn("user", "before"), turn("user", TEXT)])


ESCAPES = {
    "shortened": TEXT[:-20],
    "quoted within another": f"Summarize this: {TEXT}",
    "look-alikes": TEXT.replace("a", "\u0430"),
    "another word": TEXT.replace("nicht", "gern"),
    "other digits": TEXT.replace("3", "4"),
}


@pytest.mark.parametrize("other", ESCAPES.values(), ids=ESCAPES.keys())
def test_another_text_is_another_message(other: str) -> None:
    """What docs/sensitive.md says is not recognized."""
    assert not shares([turn("user", TEXT)], [turn("user", other)])


CALL = {"patient": "Müller", "values": [7.0, 1e3, True, None], "note": "a\nb \u2028 c"}
ANSWER, THOUGHT = "The value is too high.", "She has diabetes, I think."
FORMS: dict[str, tuple[list[Message], list[Message]]] = {
    "trimmed answer": ([turn("assistant", f"\n\n{ANSWER} ")], [turn("assistant", ANSWER)]),
    "reasoning left out": ([turn("assistant", ANSWER, THOUGHT)], [turn("assistant", ANSWER)]),
    "reasoning alone": ([turn("assistant", ANSWER, THOUGHT)], [turn("user", THOUGHT)]),
    "reasoning without tags": ([turn("assistant", ANSWER, THOUGHT)], [turn("assistant", f"{THOUGHT}\n\n{ANSWER}")]),
    **{
        f"reasoning in {begin or 'no tag'}": (
            [turn("assistant", ANSWER, THOUGHT)],
            [turn("assistant", f"{begin}\n{THOUGHT}\n{end}\n\n{ANSWER}")],
        )
        for begin, end in (
            ("<think>", "</think>"),
            ("", "</think>"),
            ("<thinking>", "</thinking>"),
            ("<reasoning>", "</reasoning>"),
            ('<details type="reasoning" done="true">', "</details>"),
            ("[THINK]", "[/THINK]"),
        )
    },
    "tags, then the answer alone": (
        [turn("assistant", f"<think>{THOUGHT}</think>{ANSWER}")],
        [turn("assistant", ANSWER)],
    ),
    "messages of one role joined": (
        [turn("user", "first part"), turn("user", "second part")],
        [turn("user", "first part\n\nsecond part")],
    ),
    "a message split in two": (
        [turn("user", "first part second part")],
        [turn("user", "first part"), turn("user", "second part")],
    ),
    "system folded into user": (
        [turn("system", "We are a clinic."), turn("user", "Name?")],
        [turn("user", "We are a clinic.\n\nName?")],
    ),
    "results of calls as one text": (
        [turn("tool", "result one"), turn("tool", "result two")],
        [turn("user", "result one\nresult two")],
    ),
    "calls' arguments, written in another way": (
        [turn("assistant", arguments=json.dumps(CALL))],
        [turn("assistant", arguments=json.dumps(dict(reversed(CALL.items())), ensure_ascii=False, indent=2))],
    ),
    "numbers as another language writes them": (
        [turn("assistant", arguments='{"a": 7.0, "b": 1000}')],
        [turn("assistant", arguments='{"b": 1e3, "a": 7}')],
    ),
    "a call's arguments as text": (
        [turn("assistant", arguments=json.dumps(CALL))],
        [turn("user", json.dumps(CALL, ensure_ascii=False))],
    ),
    "a result as a JSON string": ([turn("tool", "line one\nline é")], [turn("tool", json.dumps("line one\nline é"))]),
    "a result with sorted keys": ([turn("tool", '{"b": 1, "a": "x"}')], [turn("tool", '{"a": "x", "b": 1}')]),
    "JSON with a full stop after it": ([turn("tool", '{"b": 1, "a": "x"}')], [turn("tool", '{"b": 1, "a": "x"}.')]),
    "signs only": ([turn("user", "👍🏽 🎉")], [turn("user", "👍🏽\u200b🎉")]),
}


@pytest.mark.parametrize(("before", "after"), FORMS.values(), ids=FORMS.keys())
def test_forms_of_one_conversation_are_one(before: list[Message], after: list[Message]) -> None:
    assert shares(before, after)
    assert shares(after, before)


def test_what_says_nothing_is_not_marked() -> None:
    empty = [turn("user", ""), turn("user", " \n\u200b"), turn("assistant", arguments="{}"), turn("tool", "[]")]
    assert list(forms([*empty, turn("assistant", arguments="")])) == []


def test_calls_without_arguments_and_other_conversations_share_nothing() -> None:
    before = [turn("user", TEXT), turn("assistant", "", THOUGHT, "{}"), turn("tool", "{}"), turn("assistant", ANSWER)]
    after = [turn("user", "What time is it?"), turn("assistant", "", "", "{}"), turn("tool", "{}")]
    assert not shares(before, after)


def test_prompts_and_inputs_count_as_messages() -> None:
    ask = Generate(id=1, model="m", prompt=TEXT, max_tokens=1)
    embed = Embed(id=1, model="m", inputs=("one", TEXT, (1, 2)))
    for said_before in (messages_of(ask), messages_of(embed)):
        assert shares(list(said_before), [turn("user", TEXT)])
    assert shares(list(messages_of(embed)), list(messages_of(Embed(id=2, model="n", inputs=((1, 2),)))))
    chat = Generate(id=1, model="m", messages=(turn("user", TEXT),), max_tokens=1)
    assert messages_of(chat) == chat.messages


@given(st.text())
def test_a_normal_form_is_its_own(text: str) -> None:
    once = normal(text)
    assert normal(once.decode("utf-8", "surrogatepass")) == once or not any(c.isalnum() for c in text)


@given(st.text(), st.sampled_from(" \n\t\u00a0\u200b\u2060.,;:!?*_`-"), st.data())
def test_nothing_between_characters_changes_a_text_with_letters(text: str, sign: str, data: st.DataObject) -> None:
    if not any(c.isalnum() for c in unicodedata.normalize("NFKD", text)):
        return
    at = data.draw(st.integers(0, len(text)))
    assert normal(text[:at] + sign + text[at:]) == normal(text)
    assert normal(text.upper()) == normal(text.upper().lower().upper())


@given(st.text(alphabet=st.characters(codec="utf-8")), st.integers(1, 5))
def test_a_long_text_may_be_cut_anywhere(text: str, times: int) -> None:
    """Pieces are read one after another, so that no thread holds the interpreter for long."""
    several = "A" * (16 * 1024 - 2) + text * times
    whole = normal("A" * (16 * 1024 - 2)) + normal(text) * times
    assert normal(several) == whole or not any(c.isalnum() for c in unicodedata.normalize("NFKD", text))


@given(st.text(max_size=50))
def test_any_text_can_be_read(text: str) -> None:
    for one in (text, "[" * 3000 + text, '{"a":' + text, '"\\ud800' + text, "</think>" * 3 + text):
        assert all(found for found in said(one))
        assert all(found for found in forms([turn("assistant", one, text, one)]))


def test_marks_depend_on_the_key_and_hide_the_text() -> None:
    other = taint_key("another secret")
    one = mark(KEY, b"text")
    assert len(one) == MARK_BYTES
    assert one == mark(KEY, b"text") != mark(other, b"text")
    assert name_of(KEY) != name_of(other)
    long = b"x" * 100_000
    assert mark(KEY, long) == mark(KEY, bytes(long)) != mark(other, long)
    assert len(set(marks_of([KEY, other], [b"a", b"b", b"a"]))) == 4


def made(count: int) -> list[bytes]:
    return [mark(KEY, str(n).encode()) for n in range(count)]


@given(st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40)))
def test_a_set_of_marks_is_a_set(added: list[int], asked: list[int]) -> None:
    known = made(41)
    marks, plain = Marks(), set[bytes]()
    for n in added:
        assert marks.add(known[n]) == (known[n] not in plain)
        plain.add(known[n])
    assert len(marks) == len(plain)
    assert [known[n] in marks for n in asked] == [known[n] in plain for n in asked]
    again = Marks(reversed([known[n] for n in added]))
    assert (again.digest, again.digests()) == (marks.digest, marks.digests())
    assert {one for n in range(BUCKETS) for one in split(marks.bucket(n))} == plain


def test_bytes_across_two_marks_are_no_mark() -> None:
    head = b"\x00\x00"
    first, second = head + b"\x01" * 14, head + b"\x02" * 14
    marks = Marks([first, second])
    assert head + b"\x01" * 12 + head not in marks
    assert first[2:] + head not in Marks([first[2:4] + first[2:], first, second])
    # within the cell of two zero bytes, at another distance than a multiple of sixteen
    zeros = bytes(MARK_BYTES)
    assert zeros in Marks([head + b"\x03" * 6 + bytes(8), bytes(8) * 2])
    assert zeros not in Marks([head + b"\x03" * 6 + bytes(8), head + bytes(6) + b"\x03" * 8])


@given(st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300)))
def test_differing_buckets_are_those_with_other_marks(here: set[int], there: set[int]) -> None:
    known = made(301)
    mine, theirs = Marks(known[n] for n in here), Marks(known[n] for n in there)
    for number in mine.differing(theirs.digests()):
        for one in split(theirs.bucket(number)):
            mine.add(one)
    assert all(known[n] in mine for n in here | there)
    assert mine.differing(mine.digests()) == []
    assert len(mine.differing(b"")) == BUCKETS


@given(st.integers(0, 30), st.binary(max_size=2 * RECORD_BYTES))
def test_what_a_crash_leaves_at_the_end_is_found(count: int, tail: bytes) -> None:
    marks = made(count)
    raw = b"".join(map(record, marks))
    reading = read_records(raw + tail)
    assert all(one in reading.marks for one in marks)
    assert reading.good_bytes >= len(raw)
    assert reading.damaged == 0 or tail
    for cut in range(0, len(raw), 7):
        found = read_records(raw[:cut] + bytes(RECORD_BYTES))
        assert [one in found.marks for one in marks] == [n < cut // RECORD_BYTES for n in range(count)]
        assert found.damaged == 0


@given(st.integers(2, 20), st.data())
def test_a_changed_byte_before_others_is_damage(count: int, data: st.DataObject) -> None:
    raw = bytearray(b"".join(map(record, made(count))))
    raw[data.draw(st.integers(0, len(raw) - RECORD_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    reading = read_records(bytes(raw))
    assert (reading.damaged, len(reading.marks)) == (1, count - 1)
