"""Tool calls end to end: tiny models overfitted to a family's own format, the official client, real agents."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.overfit import (
    CLOCK,
    CONTEXT_TOK,
    FAMILIES,
    LONG,
    NONE,
    ONE,
    THANKS,
    TOOLS,
    TWO,
    WELCOME,
    WRONG,
    Call,
    overfitted,
)
from tests.rack.harness import Agent, rack, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEVERAL = [name for name, family in FAMILIES.items() if family.several]
ZONES = CLOCK["function"]["parameters"]["properties"]["zone"]["enum"]
KILLED = [("qwen", "gateway", "auto"), ("gpt-oss", "worker", "auto"), ("gpt-oss", "gateway", "required")]
KILLS = 4
"""A loader that exits five times in two minutes is not restarted automatically."""


class Racked(NamedTuple):
    """A gateway without models, and the worker that has one of each family; clients of both."""

    door: Agent
    worker: Agent
    clients: dict[str, openai.OpenAI]


@pytest.fixture(scope="module")
def racked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Racked]:
    folders = overfitted(tmp_path_factory.mktemp("families"))
    models = [
        {"name": name, "path": str(folder), "rows": 2, "plan_context_tok": CONTEXT_TOK}
        for name, folder in folders.items()
    ]
    with rack(tmp_path_factory.mktemp("rack"), [], models) as (door, worker):
        for agent in (door, worker):
            until(lambda agent=agent: len(agent.get("/v1/models").json["data"]) == len(models), "all are ready")  # type: ignore[misc]
        agents = {"gateway": door, "worker": worker}
        clients = {
            name: openai.OpenAI(base_url=f"http://127.0.0.1:{agent.port}/v1", api_key="none", max_retries=0)
            for name, agent in agents.items()
        }
        yield Racked(door, worker, clients)
        for client in clients.values():
            client.close()


Ask = Callable[..., Any]
"""(client, model, messages, more fields) -> the choice, as the client's own object."""


def whole(client: openai.OpenAI, model: str, messages: list[Any], **more: Any) -> Any:
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=more.pop("tools", TOOLS), temperature=0, **more
    )
    return answer.choices[0]


def streamed(
    client: openai.OpenAI, model: str, messages: list[Any], on_delta: Callable[[Any], None] | None = None, **more: Any
) -> Any:
    """The same by a stream, whose pieces must make one answer: a role once, and each call begun once."""
    deltas = []
    with client.chat.completions.stream(
        model=model, messages=messages, tools=more.pop("tools", TOOLS), temperature=0, **more
    ) as stream:
        for event in stream:
            if event.type == "chunk" and event.chunk.choices:
                deltas.append(event.chunk.choices[0].delta)
                if on_delta is not None:
                    on_delta(deltas[-1])
        choice = stream.get_final_completion().choices[0]
    assert sum(delta.role is not None for delta in deltas) == 1
    begun = [call for delta in deltas for call in delta.tool_calls or () if call.id]
    assert [call.index for call in begun] == list(range(len(choice.message.tool_calls or ())))
    assert len({call.id for call in begun}) == len(begun)
    assert "".join(delta.content or "" for delta in deltas) == (choice.message.content or "")
    return choice


ASKS = [pytest.param(whole, id="whole"), pytest.param(streamed, id="streamed")]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls_of(choice: Any) -> tuple[Call, ...]:
    """The calls of an answer that is nothing else."""
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    return tuple((call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls)


def said(choice: Any) -> str:
    """The text of an answer without calls."""
    assert choice.finish_reason == "stop"
    assert not choice.message.tool_calls
    return str(choice.message.content)


def reasoning(choice: Any) -> str:
    return getattr(choice.message, "reasoning_content", None) or ""


def results(choice: Any, texts: tuple[str, ...]) -> list[Any]:
    """The turns after an answer: the client's own object for it, and the results of its calls."""
    ids = [call.id for call in choice.message.tool_calls]
    turns = [{"role": "tool", "tool_call_id": one, "content": text} for one, text in zip(ids, texts, strict=True)]
    return [choice.message, *turns]


@pytest.mark.parametrize("via", ["worker", "gateway"])
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_with_a_call(racked: Racked, family: str, ask: Ask, via: str) -> None:
    client = racked.clients[via]
    asked = [user(ONE.question)]
    called = ask(client, family, asked)
    assert calls_of(called) == ONE.calls
    assert reasoning(called).strip() == max(FAMILIES[family].thoughts)
    asked += results(called, ONE.results)
    answered = ask(client, family, asked)
    assert said(answered) == ONE.answer
    asked += [answered.message, user(THANKS)]
    assert said(ask(client, family, asked)) == WELCOME


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_is_followed(racked: Racked, family: str, ask: Ask) -> None:
    client, asked = racked.clients["worker"], [user(ONE.question)]
    assert said(ask(client, family, [user(NONE.question)])) == NONE.answer
    assert calls_of(ask(client, family, asked, tool_choice="required")) == ONE.calls
    named = {"type": "function", "function": {"name": ONE.calls[0][0]}}
    assert calls_of(ask(client, family, asked, tool_choice=named)) == ONE.calls
    # a function that the model would not have called
    other = {"type": "function", "function": {"name": CLOCK["function"]["name"]}}
    ((name, arguments),) = calls_of(ask(client, family, asked, tool_choice=other))
    assert name == CLOCK["function"]["name"]
    assert arguments["zone"] in ZONES


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_follow_the_schema_that_the_model_would_break(racked: Racked, family: str, ask: Ask) -> None:
    ((name, arguments),) = calls_of(ask(racked.clients["worker"], family, [user(WRONG.question)]))
    assert name == WRONG.calls[0][0]
    assert arguments["zone"] in ZONES


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("family", SEVERAL)
def test_parallel_calls(racked: Racked, family: str, ask: Ask) -> None:
    client, asked = racked.clients["worker"], [user(TWO.question)]
    called = ask(client, family, asked)
    assert calls_of(called) == TWO.calls
    assert said(ask(client, family, [*asked, *results(called, TWO.results)])) == TWO.answer
    assert calls_of(ask(client, family, asked, parallel_tool_calls=False)) == TWO.calls[:1]
    for choice in ("auto", "required"):
        assert calls_of(ask(client, family, asked, parallel_tool_calls=False, tool_choice=choice)) == TWO.calls[:1]


@pytest.mark.parametrize(("family", "via", "choice"), KILLED)
def test_a_call_survives_its_loader(racked: Racked, family: str, via: str, choice: str) -> None:
    """SIGKILL to the loader in the middle of a streamed call: the same answer, and every call once."""
    client, asked = racked.clients[via], [user(LONG.question)]
    gateway = racked.door if via == "gateway" else racked.worker
    undisturbed = streamed(client, family, asked, tool_choice=choice)
    calls = shown(undisturbed)
    assert calls[-1] == LONG.calls[-1]
    for _ in range(KILLS):
        until(lambda: state(racked.worker, family)["state"] == "ready", "it is back")
        before, victim = continuations(gateway), Victim(state(racked.worker, family)["pid"], family)
        continued = streamed(client, family, asked, on_delta=victim.hit, tool_choice=choice)
        assert victim.pid is None
        assert shown(continued) == calls
        assert continued.message.content == undisturbed.message.content
        assert reasoning(continued) == reasoning(undisturbed)
        if continuations(gateway) > before:  # else the answer was complete already
            break
    else:
        raise AssertionError("no kill came in time")
    until(lambda: state(racked.worker, family)["state"] == "ready", "it is back")


def shown(choice: Any) -> tuple[Call, ...]:
    assert choice.finish_reason == "tool_calls"
    return tuple((call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls)


class Victim:
    """A loader that is killed once what precedes its last call has arrived."""

    def __init__(self, pid: int, family: str) -> None:
        self.pid: int | None = pid
        self._family, self._text = family, ""

    def hit(self, delta: Any) -> None:
        self._text += getattr(delta, "reasoning_content", None) or ""
        begun = self._text == LONG.beside if self._family == "gpt-oss" else bool(delta.tool_calls)
        if begun and self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = None


def state(agent: Agent, family: str) -> Any:
    return next(one for one in agent.status()["models"] if one["model"] == family)


def continuations(agent: Agent) -> int:
    return Path(agent.state, "logs", "agent.jsonl").read_text().count('"continued"')
