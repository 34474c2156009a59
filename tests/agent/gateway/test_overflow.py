"""A request on its way to other places: what is counted and paid, what still may leave, and what the rack gets back."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agent.egress import prices
from agent.egress.providers import Egress
from agent.gateway.call import Call
from agent.gateway.dispatch import _note
from agent.gateway.overflow import Overflow
from agent.gateway.passage import Passage
from agent.gateway.wall import Asked, Wall
from agent.policy.outgoing import End, Outgoing, Piece
from agent.policy.redaction import Redacted
from agent.policy.redaction.replacing import replaced
from agent.policy.rules import KeyPolicy, Money, Permission, Provider, Rules
from agent.wire.frames import Accepted, Done, Generate, Tokens
from agent.wire.namespaces import OPEN
from shared.errors import NotFound, RackError, Retryable
from tests.agent.gateway.test_wall import Book, Finds, Marks, asked, wall

OPENAI = Provider(name="openai", kind="openai", secret="env:KEY", usd_per_mtok_in="1000", usd_per_mtok_out="1000")
MAY = Permission(provider="openai", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",))
BOBS = Permission(provider="openai", use="gpt", keys=("bob",), classes=("ROUTINE",), models=("m",))
RULES = Rules(providers=(OPENAI,), allow=(MAY,), keys=(KeyPolicy(id="alice"),))


class Sent:
    """An egress that answers with these pieces; an error is raised where it stands, an event is waited for."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces, self.requests = pieces, list[Redacted]()

    async def most_usd(self, provider: Provider, outgoing: Outgoing) -> Decimal | None:
        """As the real one."""
        return await asyncio.to_thread(prices.most, provider, outgoing)

    async def send(self, redacted: Redacted) -> AsyncIterator[Piece | End]:
        """Keep the request, and answer it."""
        self.requests.append(redacted)
        for one in self.pieces:
            if isinstance(one, RackError):
                raise one
            if isinstance(one, asyncio.Event):
                await one.wait()
                continue
            yield one


class Reads(Finds):
    """An analysis that finds nothing to replace."""

    async def redacted(self, outgoing: Outgoing, target: Provider) -> Redacted:
        """The request as it is."""
        return replaced(outgoing, target, [], nonce="b" * 48)


class Tried:
    """An overflow with fakes around it; ``rack`` answers with ``served``, or fails."""

    def __init__(self, folder: Path, egress: Sent, rules: Rules = RULES, **guards: Any) -> None:
        self.rules, self.egress, self.marks, self.book = rules, egress, Marks(), Book()
        self.analysis = Reads(())
        given = {"analysis": self.analysis, "taints": self.marks, "audit": self.book}
        of_rules, made = wall(folder, rules, **{**given, **guards})
        self.wall = Wall("n1", of_rules._guards._replace(rules=lambda: self.rules))
        self.allowances = made.allowances
        self.overflow = Overflow(self.wall, egress, self.analysis, made.allowances)  # type: ignore[arg-type]
        self.served: list[Any] = [NotFound("no such model", code="model_not_found")]
        self.asked = list[Any]()

    async def enter(self, one: Asked | None = None) -> tuple[Passage, Call]:
        """A request that was let in."""
        one = one or asked()
        passage = await self.wall.enter(one)
        call = Call(ask=one.ask, request_id="r", cache=OPEN, key_id="alice", passage=passage)
        passage.calls = [call]
        return passage, call

    async def rack(self, call: Call) -> AsyncGenerator[Any, None]:
        """What a node would do."""
        self.asked.append(call.ask)
        for one in self.served:
            if isinstance(one, RackError):
                raise one
            if isinstance(one, asyncio.Event):
                await one.wait()
                continue
            call.note(one, 1.0)
            yield one

    async def run(self, call: Call) -> list[Any]:
        """The frames of the answer."""
        async with contextlib.aclosing(self.overflow.run(call, self.rack, None)) as frames:
            return [one async for one in frames]


END = End(finish="stop", prompt_tok=7, completion_tok=3)
ANSWER = (Piece(text="good"), Piece(text=" day"), END)


async def test_an_answer_from_elsewhere_has_its_tokens_and_counts_as_a_request(tmp_path: Path) -> None:
    rules = Rules(providers=(OPENAI,), allow=(MAY,), keys=(KeyPolicy(id="alice", requests_per_minute=1),))
    tried = Tried(tmp_path, Sent(*ANSWER), rules)
    passage, call = await tried.enter()
    await tried.run(call)
    tried.wall.close(passage, 200)
    assert (call.prompt_tok, call.completion_tok, call.finish) == (7, 3, "stop")
    assert call.first_s is not None
    ended = tried.book.entries[-1]
    assert (ended.prompt_tok, ended.completion_tok, ended.cost_micro) == (7, 3, 10_000)
    with pytest.raises(Retryable):
        await tried.enter()


@pytest.mark.parametrize(
    "failure", [Retryable("busy", code="provider_busy"), Retryable("failed", code="provider_failed")]
)
async def test_a_place_that_gives_no_answer_costs_nothing(tmp_path: Path, failure: RackError) -> None:
    tried = Tried(tmp_path, Sent(failure))
    passage, call = await tried.enter()
    with pytest.raises(RackError):
        await tried.run(call)
    assert not passage.usd
    tried.wall.close(passage, 503)
    assert tried.book.entries[-1].cost_micro == 0


async def test_one_that_may_have_worked_is_paid_for(tmp_path: Path) -> None:
    tried = Tried(tmp_path, Sent(Retryable("slow", code="provider_timeout")))
    passage, call = await tried.enter()
    with pytest.raises(RackError):
        await tried.run(call)
    assert passage.usd


async def test_a_keys_money_bounds_what_is_under_way_elsewhere(tmp_path: Path) -> None:
    """Each request may cost about 0.2 dollars there, and the rack's own price is not known."""
    keys = (KeyPolicy(id="alice", day=Money(usd="1.00")),)
    hold = asyncio.Event()
    tried = Tried(tmp_path, Sent(hold, *ANSWER), Rules(providers=(OPENAI,), allow=(MAY,), keys=keys))

    async def one() -> str:
        passage, call = await tried.enter()
        try:
            await tried.run(call)
        except RackError as error:
            return error.code
        finally:
            tried.wall.close(passage, 200)
        return "answered"

    tasks = [asyncio.create_task(one()) for _ in range(40)]
    while sum(task.done() for task in tasks) + len(tried.egress.requests) < len(tasks):
        await asyncio.sleep(0)
    hold.set()
    found = await asyncio.gather(*tasks)
    most = prices.most(OPENAI, tried.egress.requests[0].outgoing)
    assert most is not None
    assert 0 <= (len(tried.egress.requests) - 1) * most <= 1, "by one request at most"
    assert found.count("answered") == len(tried.egress.requests)


async def test_what_is_paid_elsewhere_is_paid_once(tmp_path: Path) -> None:
    keys = (KeyPolicy(id="alice", day=Money(usd="1.00")),)
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(OPENAI,), allow=(MAY,), keys=keys))
    for _ in range(80):  # 0.01 dollars each; twice as much would be more than there is
        passage, call = await tried.enter()
        await tried.run(call)
        tried.wall.close(passage, 200)
    assert len(tried.egress.requests) == 80


async def test_a_budget_that_cannot_be_kept_lets_nothing_leave(tmp_path: Path) -> None:
    unknown = Provider(name="openai", kind="openai", secret="env:KEY")
    permitted = Permission(provider="openai", use="none", keys=("alice",), classes=("ROUTINE",), models=("m",))
    keys = (KeyPolicy(id="alice", day=Money(usd="1.00")),)
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(unknown,), allow=(permitted,), keys=keys))
    _, call = await tried.enter()
    with pytest.raises(RackError):
        await tried.run(call)
    assert tried.egress.requests == []


async def test_an_answer_that_the_rack_has_begun_is_not_asked_for_elsewhere(tmp_path: Path) -> None:
    """One that is not streamed is given out at its end, long after the wait that the policy grants."""
    patient = Permission(
        provider="openai", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",), wait_s=0.05
    )
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(OPENAI,), allow=(patient,)))
    _, call = await tried.enter()
    done = asyncio.Event()

    async def rack(call: Call) -> AsyncGenerator[Any, None]:
        call.note(Tokens(id=1, text="here", count=1), 1.0)  # held back until the end
        await done.wait()
        yield Tokens(id=1, text="here", count=1)

    asyncio.get_running_loop().call_later(0.5, done.set)
    async with contextlib.aclosing(tried.overflow.run(call, rack, None)) as frames:
        assert [one.text async for one in frames if isinstance(one, Tokens)] == ["here"]
    assert tried.egress.requests == []


FIRST = Permission(provider="openai", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",), when="always")


async def test_what_is_found_to_be_sensitive_on_its_way_is_private_on_the_rack(tmp_path: Path) -> None:
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(OPENAI,), allow=(FIRST,)))
    tried.analysis.found = ("card",)
    tried.served = [
        Accepted(id=1, prompt_tok=1, cached_tok=0),
        Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=0),
    ]
    passage, call = await tried.enter()
    await tried.run(call)
    assert (passage.private, tried.egress.requests) == (True, [])
    assert [one.private for one in tried.asked] == [True], "no engine keeps anything of it"


async def test_what_is_found_to_be_sensitive_and_cannot_be_recorded_is_not_served(tmp_path: Path) -> None:
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(OPENAI,), allow=(FIRST,)))
    tried.analysis.found, tried.book.ok = ("card",), False
    _, call = await tried.enter()
    with pytest.raises(Retryable) as refused:
        await tried.run(call)
    assert (refused.value.code, tried.asked) == ("audit_unavailable", [])


@pytest.mark.parametrize(
    "later",
    [
        Rules(providers=(OPENAI,), allow=(MAY,), keys=(KeyPolicy(id="alice", sensitive=True),)),
        Rules(providers=(OPENAI,), allow=(MAY,), keys=(KeyPolicy(id="alice", outside=False),)),
        Rules(providers=(OPENAI,), allow=(BOBS,)),
    ],
    ids=["the key is SENSITIVE", "the key stays", "another key's"],
)
async def test_a_policy_that_came_meanwhile_keeps_what_has_not_left(tmp_path: Path, later: Rules) -> None:
    tried = Tried(tmp_path, Sent(*ANSWER))
    _, call = await tried.enter()
    tried.rules = later
    with pytest.raises(RackError):
        await tried.run(call)
    assert tried.egress.requests == []


async def test_a_mark_made_meanwhile_keeps_it_from_a_server_on_the_premises(tmp_path: Path) -> None:
    local = Provider(name="mac", kind="local", url="http://10.0.0.7:11434/v1")
    permitted = Permission(provider="mac", use="llama", keys=("alice",), classes=("ROUTINE",), models=("m",))
    tried = Tried(tmp_path, Sent(*ANSWER), Rules(providers=(local,), allow=(permitted,)))
    _, call = await tried.enter(asked("x"))
    tried.marks.added.append("x")
    with pytest.raises(RackError):
        await tried.run(call)
    assert tried.egress.requests == []


async def test_half_a_character_is_refused_and_no_bug(tmp_path: Path) -> None:
    local = Provider(name="mac", kind="local", url="http://10.0.0.7:11434/v1")
    permitted = Permission(provider="mac", use="llama", keys=("alice",), classes=("ROUTINE",), models=("m",))
    rules = Rules(providers=(local,), allow=(permitted,))
    tried = Tried(tmp_path, Sent(*ANSWER), rules)
    tried.overflow._egress = Egress(lambda: rules, {})
    _, call = await tried.enter(asked("\ud800"))
    with pytest.raises(RackError):
        await tried.run(call)


async def test_a_client_that_leaves_while_it_is_let_in_frees_what_was_reserved(tmp_path: Path) -> None:
    class Hangs(Marks):
        async def add(self, messages: Any, reasons: object = ()) -> None:
            await asyncio.Event().wait()

    rules = Rules(keys=(KeyPolicy(id="alice", requests_per_minute=1),))
    tried = Tried(tmp_path, Sent(), rules, taints=Hangs())
    for _ in range(3):
        task = asyncio.create_task(tried.wall.enter(asked(sensitive=True)))
        while not tried.book.entries or tried.book.entries[-1].kind != "decided":
            assert not task.done()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [one.kind for one in tried.book.entries[-2:]] == ["decided", "ended"]
        assert tried.book.entries[-1].outcome == "cancelled"


async def test_every_answer_and_its_reasoning_is_marked_apart(tmp_path: Path) -> None:
    tried = Tried(tmp_path, Sent())
    passage = await tried.wall.enter(asked(sensitive=True))
    parts = [Call(ask=asked().ask, request_id="r", cache=OPEN, part=n, passage=passage) for n in range(3)]
    passage.calls = parts
    for text in ("one", "two"):
        for part in parts:
            await _note(part, passage, Tokens(id=1, text=f"{text}{part.part}", reasoning="because", count=1))
    for part in parts[:2]:
        await _note(part, passage, Done(id=1, finish="stop", prompt_tok=1, cached_tok=0, completion_tok=2))
    assert tried.marks.added[1:] == ["one0two0", "one1two1"]
    tried.wall.close(passage, 499)
    assert tried.marks.added[3:] == ["one2two2"], "its client has left"
    assert isinstance(parts[0].ask, Generate)


async def test_what_becomes_sensitive_on_its_way_reaches_none_of_the_later_places(tmp_path: Path) -> None:
    first = Permission(provider="first", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",), when="always")
    other = Provider(name="first", kind="openai", secret="env:KEY", usd_per_mtok_in="1", usd_per_mtok_out="1")
    later = Permission(provider="openai", use="gpt", keys=("alice",), classes=("ROUTINE",), models=("m",), wait_s=0.01)
    rules = Rules(providers=(other, OPENAI), allow=(first, later), keys=(KeyPolicy(id="alice"),))
    tried = Tried(tmp_path, Sent(*ANSWER), rules)
    passage, call = await tried.enter()
    assert [place.category for place in passage.places] == ["outside", "rack", "outside"]
    tried.marks.added.append("hello")
    with pytest.raises(NotFound):
        await tried.run(call)
    assert tried.egress.requests == []
    assert len(tried.asked) == 1, "the rack was asked, and what it says is said"
