"""What the wall does with a decision: what it waits for, what it gives back, and what it refuses when a guard fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.audit.entry import Entry
from agent.gateway.call import Call
from agent.gateway.outcomes import OK
from agent.gateway.wall import Asked, Wall
from agent.policy.classes import Declared
from agent.policy.facts import Reason
from agent.policy.rules import KeyPolicy, Permission, Provider, Rules, Sensitive
from agent.wire.frames import Generate, Message
from agent.wire.namespaces import OPEN
from shared.errors import Refused, Retryable
from tests.made_wall import NoMarks, made_boundary

RULES = Rules(
    providers=(Provider(name="openai", kind="openai", secret="env:KEY"),),
    allow=(Permission(provider="openai", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",)),),
    keys=(KeyPolicy(id="alice", requests_per_minute=2), KeyPolicy(id="late", expires="2020-01-01")),
)


class Book:
    """An audit log that keeps entries in memory; ``ok`` False: the disk is full."""

    def __init__(self, *, ok: bool = True) -> None:
        self.entries: list[Entry] = []
        self.ok = ok

    def write(self, entry: Entry) -> bool:
        """Keep it."""
        self.entries.append(entry)
        return self.ok

    async def write_first(self, entry: Entry) -> None:
        """Keep it, if it can be kept."""
        self.write(entry)
        if not self.ok:
            raise Retryable("the disk is full", code="audit_unavailable")


class Finds:
    """An analysis with this result; None: it fails."""

    def __init__(self, found: tuple[str, ...] | None) -> None:
        self.found = found

    async def sensitive(self, texts: Sequence[str]) -> tuple[str, ...]:
        """What it found."""
        if self.found is None:
            raise Retryable("it hangs", code="analysis_failed")
        return self.found


class Marks(NoMarks):
    """Taints that have seen what is added."""

    def __init__(self, reason: Reason | None = None) -> None:
        self.reason, self.added = reason, list[str]()

    async def look(self, messages: Any) -> Any:
        """Why it is SENSITIVE."""
        return self.reason or ("taint" if any(one.content in self.added for one in messages) else None)

    async def add(self, messages: Any, reasons: object = ()) -> None:
        """Keep it."""
        self.added += [one.content for one in messages]

    def note(self, messages: Any) -> None:
        """Keep it."""
        self.added += [one.content for one in messages]


def wall(folder: Path, rules: Rules = RULES, **guards: Any) -> tuple[Wall, Any]:
    made = made_boundary(folder, rules, **{"audit": Book(), "analysis": Finds(()), "taints": Marks(), **guards})
    return made.wall, made


def asked(text: str = "hello", *, key: str = "alice", sensitive: bool = False, model: str = "m") -> Asked:
    ask = Generate(id=0, model=model, max_tokens=5, messages=(Message(role="user", content=text),))
    return Asked("req_000000000000000000000000", key, ask, Declared("ROUTINE", sensitive))


def outside(passage: Any) -> Any:
    return next(one for one in passage.places if one.category == "outside")


async def test_a_request_may_leave_after_its_text_was_analysed_and_its_decision_recorded(tmp_path: Path) -> None:
    book = Book()
    one, _ = wall(tmp_path, audit=book)
    passage = await one.enter(asked())
    assert [place.category for place in passage.places] == ["rack", "outside"]
    assert book.entries == [], "nothing is written before it would leave"
    await one.leaves(passage, outside(passage), asked().ask)
    assert [entry.kind for entry in book.entries] == ["decided"]


@pytest.mark.parametrize("found", [("card",), None], ids=["found", "fails"])
async def test_what_the_analysis_finds_or_fails_at_stays(tmp_path: Path, found: tuple[str, ...] | None) -> None:
    marks = Marks()
    one, _ = wall(tmp_path, analysis=Finds(found), taints=marks)
    passage = await one.enter(asked("the file of Mr Miller"))
    place = outside(passage)
    with pytest.raises(Refused):
        await one.leaves(passage, place, asked("the file of Mr Miller").ask)
    assert passage.private
    assert [one.category for one in passage.places] == ["rack"]
    assert marks.added == ["the file of Mr Miller"], "and it is known from now on"


async def test_a_mark_that_was_made_since_it_came_in_keeps_it(tmp_path: Path) -> None:
    marks = Marks()
    one, _ = wall(tmp_path, taints=marks)
    passage = await one.enter(asked("x"))
    marks.added.append("x")
    with pytest.raises(Refused):
        await one.leaves(passage, outside(passage), asked("x").ask)


async def test_while_the_audit_cannot_be_written_only_what_stays_and_is_not_sensitive_goes_on(tmp_path: Path) -> None:
    book, marks = Book(ok=False), Marks()
    one, _ = wall(tmp_path, audit=book, taints=marks)
    passage = await one.enter(asked())
    with pytest.raises(Retryable) as refused:
        await one.leaves(passage, outside(passage), asked().ask)
    assert refused.value.code == "audit_unavailable"
    with pytest.raises(Retryable) as refused:
        await one.enter(asked("secret", sensitive=True))
    assert refused.value.code == "audit_unavailable"
    one.close(passage, 200)
    assert book.entries[-1].kind == "ended"


@pytest.mark.parametrize(
    ("request_", "code"),
    [(asked(key="late"), "key_expired"), (asked(model="auto"), "no_route")],
    ids=["expired", "no route"],
)
async def test_a_refusal_is_recorded_and_reserves_nothing(tmp_path: Path, request_: Asked, code: str) -> None:
    book = Book()
    one, _ = wall(tmp_path, audit=book)
    for _ in range(5):
        with pytest.raises(Refused) as refused:
            await one.enter(request_)
        assert refused.value.code == code
    assert [(entry.decision, entry.code, entry.outcome) for entry in book.entries] == [("refuse", code, "refused")] * 5


async def test_what_was_refused_before_work_counts_against_no_limit_and_what_was_begun_does(tmp_path: Path) -> None:
    one, _ = wall(tmp_path)
    for _ in range(5):
        one.close(await one.enter(asked()), 503)
    for _ in range(2):
        passage = await one.enter(asked())
        call = Call(ask=asked().ask, request_id="r", cache=OPEN, worker="n1", completion_tok=1, end=OK)
        passage.calls = [call]
        one.close(passage, 200)
    with pytest.raises(Retryable) as refused:
        await one.enter(asked())
    assert refused.value.code == "rate_limited"


async def test_incomplete_marks_make_it_sensitive_and_what_could_not_leave_waits_for_no_disk(tmp_path: Path) -> None:
    book = Book(ok=False)
    one, _ = wall(tmp_path, Rules(), audit=book, taints=Marks("taint_not_loaded"))
    passage = await one.enter(asked())
    assert passage.facts.sensitive == ("taint_not_loaded",)
    assert book.entries == []
    with pytest.raises(Retryable):
        await wall(tmp_path, Rules(), audit=book)[0].enter(asked(sensitive=True))


async def test_configured_words_are_looked_for_before_anything_is_decided(tmp_path: Path) -> None:
    rules = Rules(sensitive=Sensitive(words=("patient",)))
    one, _ = wall(tmp_path, rules, analysis=Finds(("words",)))
    assert (await one.enter(asked())).facts.sensitive == ("detector",)
